"""A language model in 4 or 8 bits: which of it is stored so, what it computes, what its adapters are merged into and sit on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from model.build import build_model
from model.card import read_card
from model.config import LlmConfig, LoraConfig, ModelConfig, QuantizeConfig
from model.errors import ConfigError
from model.files.tensor_files import in_memory
from model.llm.causal_lm import head_weight
from model.llm.quantize import dequantised
from model.llm.quantized_linear import Quantised, QuantLoraLinear, num_parameters, quantised
from model.load import load_model
from model.lora import adapted
from model.multimodal import MultimodalLM
from tests.support.config import problems
from tests.support.finals import NO_LORA, Run, build, config_of, save_checkpoint, save_final, save_parts, trained, values
from tests.support.llm import batch
from tests.support.tiny import LLMS, save_llm
from tools.export_adapter import main as export
from tools.merge_lora import main as merge
from trainer.runfile.part_checks import quantize_problems

NF4, FP4, EIGHT = QuantizeConfig(4), QuantizeConfig(4, "fp4", False), QuantizeConfig(8)
KINDS = pytest.mark.parametrize("quantize", [NF4, FP4, EIGHT], ids=["nf4", "fp4", "8 bits"])
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
"""bitsandbytes' own layers are right on this machine only where rows are whole blocks."""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return save_parts(tmp_path / "parts", **WIDE)


def logits(model: Any) -> Tensor:
    """Of the real tokens of a batch of text, by the language model alone, in evaluation mode."""
    data = batch()
    assert data.attention_mask is not None
    llm = model.llm if isinstance(model, MultimodalLM) else model
    llm.eval()
    with torch.no_grad():
        return llm(input_ids=data.input_ids, attention_mask=data.attention_mask, use_cache=False).logits[data.attention_mask.bool()]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def by_bitsandbytes(folder: Path, quantize: QuantizeConfig) -> Any:
    """transformers' model of a folder with bitsandbytes' layers in it, but for the head."""
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, linear in [(p, m) for p, m in llm.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"]:
        parent, _, name = path.rpartition(".")
        options = {"quant_type": quantize.type, "compress_statistics": quantize.double}
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, **options
        )
        layer.weight = bitsandbytes.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, module=layer, **options)
        layer.bias = linear.bias
        layer.support_avx512bf16_for_cpu = False  # in evaluation mode it would compute in bfloat16, whatever its compute_dtype
        setattr(llm.get_submodule(parent), name, layer.to("cpu"))
    return llm


@pytest.mark.parametrize("family", LLMS)
def test_every_matrix_but_the_head_is_stored_in_codes(tmp_path: Path, family: str) -> None:
    config = ModelConfig(LlmConfig(str(save_llm(tmp_path, family, **WIDE)), "lora"), dtype="bfloat16")
    model, plain = build_model(config, NO_LORA, quantize=NF4), build_model(config, NO_LORA)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {path.rpartition(".")[2] for path, _ in quantised(model)} == names
    assert {p for p, _ in quantised(model)} == {p for p, _ in adapted(model)} == {p for p, _ in adapted(plain)}
    stored = {n for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert stored == {f"{p}.{kind}" for p, _ in quantised(model) for kind in ("codes", "scales")}
    assert head_weight(model.llm).dtype == torch.bfloat16
    tied = plain.llm.get_input_embeddings().weight is head_weight(plain.llm)  # type: ignore[operator]
    assert (model.llm.get_input_embeddings().weight is head_weight(model.llm)) == tied  # type: ignore[operator]
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learns.values()} == {torch.float32} and all(".lora_" in n for n in learns)
    assert num_parameters(model) == sum(p.numel() for p in plain.parameters())


def test_towers_and_projectors_stay_as_they_are(parts: Path) -> None:
    model = build(config_of(parts, "lora", "lora"), quantize=NF4).model
    assert {path.partition(".")[0] for path, _ in quantised(model)} == {"llm"}
    assert {path.partition(".")[0] for path, _ in adapted(model)} == {"llm", "vision"}


@pytest.mark.parametrize("quantize", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("family", LLMS)
def test_logits_are_those_of_bitsandbytes_layers(tmp_path: Path, family: str, quantize: QuantizeConfig) -> None:
    folder = save_llm(tmp_path, family, **WIDE)
    ours = logits(build_model(ModelConfig(LlmConfig(str(folder), "lora"), dtype="float32"), NO_LORA, quantize=quantize))
    close(ours, logits(by_bitsandbytes(folder, quantize)))
    assert (ours - logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))).abs().max() > 1e-2


@KINDS
@pytest.mark.parametrize("save", [save_final, save_checkpoint])
def test_a_trained_run_is_read_back_as_it_was(parts: Path, tmp_path: Path, quantize: QuantizeConfig, save: Any) -> None:
    """As it was stored without merging, to the bit; merged into what its matrices were, in float32."""
    run = trained(config_of(parts), quantize=quantize)
    folder = save(run, tmp_path)
    live = logits(run.model)
    beside, merged = load_model(folder, merge_lora=False), load_model(folder)
    assert torch.equal(logits(beside), live) and not any(True for _ in quantised(merged))
    close(logits(merged), live)
    file = safe_open(parts / "llm" / "model.safetensors", framework="pt")
    for path, layer in adapted(run.model):
        base = dequantised(in_memory(file.get_tensor(path.removeprefix("llm.") + ".weight")), quantize).all()
        expected = base + NO_LORA.scale * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(merged.get_parameter(f"{path}.weight"), expected, rtol=0, atol=1e-6)
    assert merged.generate(data := batch_of_text(run)) == run.model.eval().generate(data)


def batch_of_text(run: Run) -> Any:
    return run.processor([{"conversations": [{"from": "human", "value": "What is this?"}]}])


def test_what_is_saved_holds_no_codes_and_says_how_it_was_trained(parts: Path, tmp_path: Path) -> None:
    run = trained(config_of(parts), quantize=FP4)
    final, checkpoint = save_final(run, tmp_path), save_checkpoint(run, tmp_path)
    assert not list(final.glob("llm*")) and read_card(final).quantize == read_card(checkpoint).quantize == FP4
    for file in (*final.glob("*.safetensors"), *checkpoint.glob("*.safetensors")):
        assert not [name for name in safe_open(file, framework="pt").keys() if "codes" in name or "scales" in name]  # noqa: SIM118


def test_cards_from_before_quantisation_mean_none(parts: Path, tmp_path: Path) -> None:
    folder = save_final(trained(config_of(parts)), tmp_path)
    card = json.loads((folder / "model.json").read_text())
    assert card.pop("quantize")["bits"] == 16
    (folder / "model.json").write_text(json.dumps(card))
    assert read_card(folder).quantize == QuantizeConfig()


@KINDS
def test_a_merged_run_stands_alone(parts: Path, tmp_path: Path, quantize: QuantizeConfig) -> None:
    run = trained(config_of(parts, vision="lora"), quantize=quantize)
    folder = save_final(run, tmp_path)
    expected = values(load_model(folder))
    assert merge([str(folder), str(tmp_path / "out")]) == 0
    (parts / "llm").rename(tmp_path / "gone")
    found = load_model(tmp_path / "out")
    assert all(torch.equal(p, expected[n]) for n, p in values(found).items()) and read_card(tmp_path / "out").quantize.bits == 16
    close(logits(found), logits(run.model))


@pytest.mark.parametrize("quantize", [NF4, FP4], ids=["nf4", "fp4"])
def test_peft_computes_the_same_on_bitsandbytes_layers(
    parts: Path, tmp_path: Path, quantize: QuantizeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(config_of(parts), quantize=quantize)
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "out"), "--for", "peft"]) == 0
    assert f"trained beside {parts / 'llm'} in 4 bits: load that so" in capsys.readouterr().out
    base = by_bitsandbytes(parts / "llm", quantize)
    known = base.get_input_embeddings().weight.shape[0]  # our matrix has a row for the placeholder as well
    close(logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))), logits(run.model)[:, :known])


BORDERS = {
    "goes on as it is": ({"llm": "lora"}, NF4, 0.0),
    "merged, then learns in full": ({"llm": "full"}, QuantizeConfig(), 1e-5),
    "merged, then frozen": ({"llm": "frozen"}, QuantizeConfig(), 1e-5),
}


@pytest.mark.parametrize("tune", ["lora", "frozen"])
@pytest.mark.parametrize("border", BORDERS)
def test_a_run_starts_with_what_the_one_before_it_computed(parts: Path, tmp_path: Path, tune: str, border: str) -> None:
    """Matrices that nothing was merged into too: what was learned beside them knows them as they were stored."""
    first = trained(config_of(parts, tune), quantize=NF4)
    folder = save_final(first, tmp_path / "first")
    options, quantize, tolerance = BORDERS[border]
    second = build(config_of(parts, **options, init_from=str(folder)), quantize=quantize)
    found, expected = logits(second.model), logits(first.model)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    # And what is written then does not forget it, though nothing of the first run's files is needed any more.
    third = load_model(save_final(second, tmp_path / "second"))
    close(logits(third), expected)


def test_a_merged_matrix_may_be_stored_in_codes_again(parts: Path, tmp_path: Path) -> None:
    first = trained(config_of(parts), quantize=NF4)
    folder = save_final(first, tmp_path / "first")
    second = build(config_of(parts, "frozen", init_from=str(folder)), quantize=EIGHT)
    path = "llm.model.layers.1.mlp.up_proj"
    merged = load_model(folder).get_parameter(f"{path}.weight")
    layer = second.model.get_submodule(path)
    assert isinstance(layer, Quantised)
    assert torch.equal(layer.matrix(torch.float32), dequantised(in_memory(merged), EIGHT).all())


@pytest.mark.parametrize(("before", "now"), [(NF4, QuantizeConfig()), (QuantizeConfig(), NF4), (NF4, FP4)])
def test_an_adapter_goes_on_only_beside_what_it_was_trained_beside(
    parts: Path, tmp_path: Path, before: QuantizeConfig, now: QuantizeConfig
) -> None:
    folder = save_final(trained(config_of(parts), quantize=before), tmp_path)
    with pytest.raises(ConfigError, match=r"the adapter in .* was trained with"):
        build(config_of(parts, init_from=str(folder)), quantize=now)


def test_an_inherited_language_model_is_exported_as_it_computes(parts: Path, tmp_path: Path) -> None:
    first = save_final(trained(config_of(parts)), tmp_path / "first")
    middle = save_final(build(config_of(parts, "frozen", init_from=str(first)), quantize=NF4), tmp_path / "middle")
    run = trained(config_of(parts, init_from=str(middle)), quantize=NF4)
    assert export([str(save_final(run, tmp_path / "run")), str(tmp_path / "out"), "--for", "peft"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    close(logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))), logits(run.model))


def test_rows_of_new_tokens_learn_beside_codes(parts: Path, tmp_path: Path) -> None:
    config = config_of(parts, "new_tokens")
    config = replace(config, llm=replace(config.llm, new_tokens=("<a>", "<b>")))
    run = trained(config, quantize=NF4)
    assert not list(adapted(run.model)) and len(list(quantised(run.model))) == 14
    folder = save_final(run, tmp_path)
    for merge_lora in (False, True):
        close(logits(load_model(folder, merge_lora=merge_lora)), logits(run.model))


def test_experts_are_no_linear_layers(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    MixtralForCausalLM(MixtralConfig(vocab_size=320, num_local_experts=2, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"quantize\.bits = 4: MixtralForCausalLM is a mixture of experts"):
        build_model(ModelConfig(LlmConfig(str(tmp_path), "lora"), dtype="float32"), NO_LORA, quantize=NF4)


def test_codes_cannot_learn(parts: Path) -> None:
    with pytest.raises(ConfigError, match="stored in 8 bits cannot learn"):
        build(config_of(parts, "full"), quantize=EIGHT)
    text = problems(quantize={"bits": 4}, model={"llm": {"tune": "full"}})
    assert "quantize.bits = 4 with model.llm.tune = 'full': a matrix stored in 4 bits cannot learn" in text


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"bits": 5}, "quantize.bits = 5 is not 16 | 8 | 4"),
        ({"bits": 4, "type": "nf3"}, "did you mean 'nf4'?"),
        ({"type": "fp4"}, "quantize.type = 'fp4' has no effect with quantize.bits = 16"),
        ({"bits": 8, "double": False}, "quantize.double = False has no effect with quantize.bits = 8"),
    ],
)
def test_settings_are_named(table: dict[str, Any], expected: str) -> None:
    assert expected in problems(quantize=table)


def test_a_missing_package_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.runfile.part_checks.find_spec", lambda name: None)
    (found,) = quantize_problems(NF4, ModelConfig(LlmConfig("x")))
    assert "pip install -e '.[quantize]'" in found and not list(quantize_problems(QuantizeConfig(), ModelConfig(LlmConfig("x"))))


def test_only_adapters_biases_and_dropout_are_new_in_an_adapted_layer(parts: Path) -> None:
    run = build(config_of(parts), LoraConfig(rank=2, bias="all", dropout=0.5), quantize=NF4)
    layer = run.model.get_submodule("llm.model.layers.0.self_attn.q_proj")
    assert isinstance(layer, QuantLoraLinear)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"bias", "lora_A", "lora_B"}
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    whole = nn.functional.linear(x, layer.matrix(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), whole + layer.scale * x @ layer.lora_A.T @ layer.lora_B.T)
