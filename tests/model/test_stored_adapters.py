"""Stored adapters and projectors: each form computes what PEFT or LLaVA computes with it, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig, VisionProjectorConfig
from model.errors import ConfigError
from model.vision.projector import build_vision_projector
from model.weights.peft_settings import DEFAULTS, NO_EFFECT, REFUSED, SELECTORS
from model.weights.projector_files import whole_projector
from tests.support.tiny import save_llm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "stored_forms.md"
IDS = torch.arange(3, 40)[None]
TARGETS = ["q_proj", "down_proj"]
OURS = LoraConfig(rank=4, alpha=8, dropout=0.0, targets=("llm.*.q_proj", "llm.*.down_proj"))
EQUAL, READ = "equal to PEFT", "read"
WEIGHTS = "adapter_model.safetensors"


class Form(NamedTuple):
    """How an adapter is saved with PEFT, what is changed in the folder, how it is asked for, and what comes of it."""

    expected: str  # EQUAL, or words of the refusal
    peft: dict[str, Any] = {}  # noqa: RUF012  never changed
    asked: dict[str, Any] = {}  # noqa: RUF012
    change: Callable[[Path], None] | None = None
    converted: bool = False  # saved by PEFT's own conversion to an adapter of the base as it was


def setting(**values: Any) -> Callable[[Path], None]:
    """Other values in adapter_config.json; None removes a key."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def tensors(edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


BIAS = "base_model.model.model.layers.0.self_attn.v_proj.bias"
INIT = "changes the weights of the base"
FORMS: dict[str, Form] = {
    "as PEFT writes it": Form(EQUAL),
    "`adapter_model.bin`": Form(EQUAL, change=as_bin),
    "`use_rslora = true`": Form(EQUAL, {"use_rslora": True}, {"rslora": True}),
    "`use_rslora = true` under `lora.rslora = false`": Form("lora.rslora = False", {"use_rslora": True}),
    "another `r`, another `lora_alpha`": Form("rank = 2, but lora.rank = 4", {"r": 2, "lora_alpha": 4}),
    "`bias = \"lora_only\"`": Form(EQUAL, {"bias": "lora_only"}, {"bias": "lora_only"}),
    "`bias = \"all\"`": Form(EQUAL, {"bias": "all"}, {"bias": "all"}),
    "`bias = \"lora_only\"` under `lora.bias = \"all\"`": Form(EQUAL, {"bias": "lora_only"}, {"bias": "all"}),
    "`bias = \"lora_only\"` under `lora.bias = \"none\"`": Form("set lora.bias = 'lora_only'", {"bias": "lora_only"}),
    "`bias = \"all\"` under `lora.bias = \"lora_only\"`": Form("set lora.bias = 'all'", {"bias": "all"}, {"bias": "lora_only"}),
    "a trained bias that is missing": Form(
        "has no llm.model.layers.0.self_attn.v_proj.bias",
        {"bias": "all"},
        {"bias": "all"},
        tensors(lambda found: {name: value for name, value in found.items() if name != BIAS}),
    ),
    "a bias that `bias = \"none\"` denies": Form(
        "also has llm.model.layers.0.self_attn.v_proj.bias", change=tensors(lambda found: {**found, BIAS: torch.ones(32)})
    ),
    "`target_modules` as a regular expression": Form(EQUAL, {"target_modules": r".*\.(q_proj|down_proj)"}),
    "`layers_to_transform = [1]`": Form(
        EQUAL, {"layers_to_transform": [1]}, {"targets": ("llm.*.1.*q_proj", "llm.*.1.*down_proj")}
    ),
    "`target_modules` that leave out a layer of the file": Form(
        "holds an adapter of model.layers.0.mlp.down_proj", change=setting(target_modules=["q_proj"])
    ),
    "`exclude_modules` that name a layer of the file": Form(
        "its target_modules and exclude_modules leave out", change=setting(exclude_modules=["q_proj"])
    ),
    "`rank_pattern`, `alpha_pattern` equal to the whole": Form(
        EQUAL, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}
    ),
    "`rank_pattern` of another rank": Form("uses rank_pattern", {"rank_pattern": {"q_proj": 2}}),
    "`alpha_pattern` of another alpha": Form("uses alpha_pattern", {"alpha_pattern": {"q_proj": 2}}),
    "`init_lora_weights = \"pissa\"`": Form(INIT, {"init_lora_weights": "pissa"}),
    "`init_lora_weights = \"pissa\"`, converted by PEFT": Form(
        EQUAL, {"init_lora_weights": "pissa"}, {"rank": 8, "alpha": 16}, converted=True
    ),
    "`init_lora_weights = \"pissa_niter_4\"`": Form(INIT, {"init_lora_weights": "pissa_niter_4"}),
    "`init_lora_weights = \"olora\"`": Form(INIT, {"init_lora_weights": "olora"}),
    "`init_lora_weights = \"corda\"`": Form(INIT, change=setting(init_lora_weights="corda")),
    "`init_lora_weights = \"loftq\"`": Form(INIT, change=setting(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})),
    "`init_lora_weights = \"lora_ga\"`": Form(INIT, change=setting(init_lora_weights="lora_ga")),
    "`init_lora_weights` of a later PEFT": Form("which PEFT 0.21 does not have", change=setting(init_lora_weights="warp")),
    "`fan_in_fan_out = true` (of `Conv1D` alone)": Form(EQUAL, {"fan_in_fan_out": True}),
    "`use_dora`": Form("uses use_dora", {"use_dora": True}),
    "`alora_invocation_tokens`": Form("uses alora_invocation_tokens", {"alora_invocation_tokens": [3, 4]}),
    "`trainable_token_indices`": Form("uses trainable_token_indices", {"trainable_token_indices": [3, 4]}),
    "`modules_to_save`": Form("uses modules_to_save", {"modules_to_save": ["lm_head"]}),
    "`target_parameters`": Form("uses target_parameters", {"target_parameters": ["mlp.up_proj.weight"]}),
    "`lora_bias`": Form("uses lora_bias", {"lora_bias": True}),
    "a setting that PEFT 0.21 does not have": Form("uses 'lora_warp' = 2", change=setting(lora_warp=2)),
    "such a setting, empty": Form(EQUAL, change=setting(lora_warp=False, enable_lora=[], merge_weights=False)),
    "another `peft_type`": Form("is a IA3 adapter", change=setting(peft_type="IA3")),
    "`task_type = \"SEQ_CLS\"`": Form("has task_type = 'SEQ_CLS'", change=setting(task_type="SEQ_CLS")),
    "an adapter of the head": Form("llm.lm_head is the head", {"target_modules": [*TARGETS, "lm_head"]}),
    "an adapter of the embeddings": Form("lora_embedding_A", {"target_modules": [*TARGETS, "embed_tokens"]}),
    "a vocabulary matrix in the file": Form(
        "llm.model.embed_tokens.weight",
        change=tensors(lambda found: {**found, "base_model.model.model.embed_tokens.weight": torch.ones(96, 32)}),
    ),
    "a tensor outside PEFT's names": Form(
        "which PEFT would not read", change=tensors(lambda found: {**found, "model.norm.weight": torch.ones(32)})
    ),
    "names of a language model inside a larger model": Form(
        "a part of a larger model",
        change=tensors(lambda found: {n.replace("model.model.", "model.model.language_model."): t for n, t in found.items()}),
    ),
    "integers": Form("torch.int8", change=tensors(lambda found: {n: t.to(torch.int8) for n, t in found.items()})),
    "a matrix that is missing": Form("has no llm.", change=tensors(lambda found: dict(sorted(found.items())[1:]))),
}  # fmt: skip
INITS = ("gaussian", "orthogonal", "mica", False)
FORMS |= {f"`init_lora_weights = {json.dumps(kind)}`": Form(EQUAL, {"init_lora_weights": kind}) for kind in INITS}
FORMS['`init_lora_weights = "eva"`'] = Form(EQUAL, {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()})
FORMS["`kasa_config = {}`, which means its defaults"] = Form("uses kasa_config = {}", change=setting(kasa_config={}))
OTHERS: dict[str, Any] = {
    "layer_replication": [[0, 2], [1, 2]],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 4},
    "monteclora_config": {"num_samples": 8},
    "megatron_config": {"hidden_size": 32},
}
FORMS |= {f"`{key}`": Form(f"uses {key}", change=setting(**{key: value})) for key, value in OTHERS.items()}


def test_every_setting_of_peft_has_its_answer() -> None:
    known = {*DEFAULTS, *SELECTORS, *NO_EFFECT, *REFUSED, "peft_type", "task_type"}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


def randomised(base: torch.nn.Module, form: Form, folder: Path) -> None:
    """An adapter as PEFT saves it, every tensor that learns away from its start."""
    torch.manual_seed(3)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **form.peft}
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))  # type: ignore[arg-type]
    first = {"path_initial_model_for_weight_conversion": str(folder / "first")} if form.converted else {}
    if first:
        wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it: the first adapter changes no base
        wrapped.save_pretrained(str(folder / "first"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(folder), **first)


def ours(base: Path, folder: Path, asked: dict[str, Any]) -> Tensor:
    lora = LoraConfig(**{**vars(OURS), "path": str(folder), **asked})
    model: Any = build_model(ModelConfig(LlmConfig(str(base), "lora"), dtype="float32"), lora).eval()
    with torch.no_grad():
        return model.llm(input_ids=IDS).logits


def outcome(expected: str, run: Callable[[], float]) -> str:
    """What a form came to, as the table has it."""
    try:
        difference = run()
    except ConfigError as error:
        message = str(error)
        assert expected not in (EQUAL, READ) and expected in message, (expected, message)
        assert len(message) < 1000
        return f"refused: {expected}"
    assert expected in (EQUAL, READ) and difference <= 1e-5, (expected, difference)
    return expected


@pytest.mark.filterwarnings("ignore")
def test_every_stored_adapter_is_what_peft_makes_of_it_or_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llm(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    found = {}
    for i, (what, form) in enumerate(FORMS.items()):
        folder = tmp_path / str(i)
        saved = tmp_path / f"{form.peft}{form.converted}".replace("/", "_")[:200]
        if not saved.exists():
            randomised(base, form, saved)
        shutil.copytree(saved, folder)
        if form.change:
            form.change(folder)

        def difference(folder: Path = folder, form: Form = form) -> float:
            result = ours(tmp_path / "base", folder, form.asked)
            with torch.no_grad():
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(input_ids=IDS).logits
                assert (theirs - base(input_ids=IDS).logits).abs().max() > 1e-2  # the adapter does something
            return float((result - theirs).abs().max() / theirs.abs().max())

        found[what] = outcome(form.expected, difference)
    check_page(found, capsys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", ["", WEIGHTS])
def test_an_adapter_in_the_folder_of_its_base_is_what_transformers_loads_there(tmp_path: Path, named: str) -> None:
    save_llm(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    randomised(plain, Form(EQUAL), tmp_path)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(input_ids=IDS).logits
        assert (theirs - plain(input_ids=IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(ours(tmp_path, tmp_path / named, {}), theirs, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"name it as lora\.path"):
        build_model(ModelConfig(LlmConfig(str(tmp_path), "lora"), dtype="float32"), OURS)


PROJECTOR = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
LLAVA = "model.mm_projector."
PROJECTORS: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "ours": (READ, "", {}),
    "LLaVA's `mm_projector.bin`": (READ, LLAVA, {}),
    "`non_lora_trainables.bin`": (READ, f"base_model.model.{LLAVA}", {}),
    "rows of `<im_start>`, `<im_end>` beside it": ("mm_use_im_start_end", LLAVA, {"model.embed_tokens.weight": (9, 32)}),
    "a tuned tower beside it": ("a vision tower that was trained", LLAVA, {"model.vision_tower.vision_tower.post.weight": (24,)}),
    "a resampler beside it": ("a resampler of LLaVA-NeXT", LLAVA, {"model.vision_resampler.query": (4, 32)}),
    "anything else beside it": ("beside the projector, as 'model.norm.weight'", LLAVA, {"model.norm.weight": (32,)}),
    "a projector twice": ("two tensors for 0.bias", LLAVA, {f"module.{LLAVA}0.bias": (32,)}),
    "a tensor that the kind has not": ("holds 'vision_projector.4.weight'", "", {"4.weight": (32, 32)}),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_every_stored_projector_is_read_whole_or_refused_by_name(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, found = build_vision_projector(VisionProjectorConfig(), 24, 32), {}
    for i, (what, (expected, prefix, beside)) in enumerate(PROJECTORS.items()):
        stored = {prefix + name: torch.randn(shape) for name, shape in PROJECTOR.items()}
        file = tmp_path / f"{i}{suffix}"
        values = {**stored, **{name: torch.randn(shape) for name, shape in beside.items()}}
        if suffix == ".bin":
            torch.save(values, file)
        else:
            save_file(values, file)

        def difference(file: Path = file, stored: dict[str, Tensor] = stored, prefix: str = prefix) -> float:
            rows = whole_projector(file, "vision_projector", module)
            assert rows.keys() == {f"vision_projector.{name}" for name in PROJECTOR}
            return max(float((rows[f"vision_projector.{n}"].all() - stored[prefix + n]).abs().max()) for n in PROJECTOR)

        found[f"projector: {what}"] = outcome(expected, difference)
    check_page(found, capsys)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("part", ["vision_projector", "audio_projector"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_a_projector_in_codes_is_refused_by_its_type(tmp_path: Path, dtype: torch.dtype, part: str, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    values = {name: torch.ones(shape) for name, shape in PROJECTOR.items()} | {"2.weight": torch.ones(32, 32).to(dtype)}
    torch.save(values, file) if suffix == ".bin" else save_file(values, file)
    with pytest.raises(ConfigError, match=rf"model\.{part}\.path = .*2\.weight.* is {dtype}: codes are no weights"):
        whole_projector(file, part, build_vision_projector(VisionProjectorConfig(), 24, 32))


def check_page(found: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Print the rows; the page of the documentation holds each."""
    rows = [f"| {what} | {result} |" for what, result in found.items()]
    with capsys.disabled():
        print("", *rows, sep="\n")
    missing = [row for row in rows if row not in PAGE.read_text().splitlines()]
    assert not missing, "docs/stored_forms.md lacks:\n" + "\n".join(missing)
