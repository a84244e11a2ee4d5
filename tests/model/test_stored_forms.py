"""Whatever form a base, a tower, an encoder or a vocabulary is stored in: equal to transformers, or refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    FineGrainedFP8Config,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data.records.record import RecordError, parse
from data.text.template import TemplateOptions, load_template
from data.text.tokenizer import load_tokenizer, save_tokenizer
from model.build import build_model
from model.config import AudioConfig, AudioProjectorConfig, LlmConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.errors import ConfigError
from model.exports.llm_folder import write_llm
from model.files.quantised_base import dequantised_fp8
from model.files.tensor_files import in_memory
from model.load import load_model
from tests.support.finals import config_of as run_config
from tests.support.finals import save_final, save_parts, trained
from tests.support.router import save_mixture
from tests.support.stored_forms import ENCODER_FORMS, EQUAL, FP8, LLM_FORMS, Form, read, write
from tests.support.tiny import SIZES, save_llm, save_tower, spread
from tests.support.tiny_audio import MELS, save_whisper
from tests.support.tiny_tokenizers import NAMES
from trainer.records.vocabulary import check_surplus, plan_vocabulary

FORMS = [*LLM_FORMS, *ENCODER_FORMS]
PAGE = Path(__file__).parents[2] / "docs" / "stored_forms.md"
IDS = torch.arange(300, 318)[None]
ATTENTION: dict[str, Any] = {"hashed": "eager"}
"""Classes that compute attention in another way than by sdpa."""


def save_corrected(folder: Path) -> None:
    """A mixture whose routers hold buffers with weights in them."""
    routing = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    sizes = {**SIZES, "head_dim": 8, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    torch.manual_seed(1)
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **routing))
    spread(model)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.normal_()
    model.save_pretrained(folder)


def save_published_gpt2(folder: Path) -> None:
    """GPT-2 as OpenAI's folder has it: names without `transformer.`, causal masks among the weights, a tied head."""
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    spread(model)
    model.save_pretrained(folder)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(2)}
    write(folder, {name.removeprefix("transformer."): t for name, t in read(folder).items()} | masks)


def save_family(folder: Path, kind: str, **sizes: Any) -> None:
    """A tiny model of a family by its model_type, in the layout that its authors published."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes, "tie_word_embeddings": False}))
    spread(model)
    model.save_pretrained(folder)


def save_hashed(folder: Path) -> None:
    """A mixture whose first router is a table of experts by token: a kept buffer of integers."""
    routing = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["hash_moe", "moe"]}
    ranks = {"num_key_value_heads": 1, "head_dim": 8, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "sliding_window": 8}
    sizes = {**SIZES, **routing, **ranks, "hc_mult": 2, "layer_types": ["sliding_attention"] * 2, "pad_token_id": 0}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v4", **sizes))
    spread(model)
    table = model.get_buffer("model.layers.0.mlp.gate.tid2eid")
    table.copy_(torch.randint(4, table.shape))
    model.save_pretrained(folder, save_original_format=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder of each kind of part."""
    root = tmp_path_factory.mktemp("plain")
    save_llm(root / "llm", "qwen2")
    save_llm(root / "llm_tied", "qwen2_tied")
    save_mixture(root / "mixture", "mixtral")
    merge_shards(root / "mixture")
    save_corrected(root / "corrected")
    save_published_gpt2(root / "gpt2")
    save_family(root / "neox", "gpt_neox")
    save_family(root / "granite", "granitemoe", num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    save_family(root / "hybrid", "olmo_hybrid", layer_types=["linear_attention", "full_attention"], pad_token_id=0)
    save_hashed(root / "hashed")
    for family in ("clip", "siglip", "dinov2"):
        save_tower(root / family, family)
    save_whisper(root / "whisper", seconds=1)
    return root


def merge_shards(folder: Path) -> None:
    """Make one file of an index and its shards."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write(folder, tensors)


def config_of(form: Form, folder: Path, plain: Path) -> ModelConfig:
    if form.part in ("clip", "siglip", "dinov2"):
        vision = VisionConfig(str(folder))
        return ModelConfig(LlmConfig(str(plain / "llm"), "frozen"), vision, VisionProjectorConfig(), dtype="float32")
    if form.part == "whisper":
        audio = AudioConfig(str(folder))
        llm = LlmConfig(str(plain / "llm"), "frozen")
        return ModelConfig(llm, audio=audio, audio_projector=AudioProjectorConfig(), dtype="float32")
    return ModelConfig(
        LlmConfig(str(folder), "frozen", **form.settings), dtype="float32", attention=ATTENTION.get(form.part, "sdpa")
    )


def ours(form: Form, config: ModelConfig) -> Tensor:
    """What the part of a form computes, loaded by ours."""
    model = build_model(config).eval()
    if config.vision:
        return model.get_submodule("vision")(pixels())
    if config.audio:
        return model.get_submodule("audio")(mels(), torch.tensor([100]))
    return model.llm(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def theirs(form: Form, folder: Path, plain: Path) -> Tensor:
    """What it computes, loaded by transformers; parts of larger models by their own class."""
    if form.part == "whisper":
        return whisper(folder)
    if form.part in ("clip", "siglip", "dinov2"):
        tower = CLIPVisionModel if form.part == "clip" else AutoModel
        # The class of a tower finds its names inside a whole CLIP, not inside a LLaVA.
        source = plain / form.part if "LLaVA" in form.name else folder
        found: Any = tower.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa").eval()
        prefix = 0 if form.part == "siglip" else 1
        return found(pixel_values=pixels(), output_hidden_states=True).hidden_states[-2][:, prefix:]
    options: dict[str, Any] = {}
    if form.settings:
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        block, kind = stored["weight_block_size"], stored.get("scale_fmt", "float")
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True, weight_block_size=block, scale_fmt=kind)
    options["attn_implementation"] = ATTENTION.get(form.part, "sdpa")
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return llm(input_ids=IDS, use_cache=False).logits


def whisper(folder: Path) -> Tensor:
    encoder: Any = WhisperEncoder(WhisperConfig(**json.loads((folder / "config.json").read_text()))).eval()
    encoder.load_state_dict(
        {n.removeprefix("model.encoder."): t for n, t in read(folder).items() if "decoder" not in n and "proj_out" not in n}
    )
    return encoder(mels()).last_hidden_state


def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def mels() -> Tensor:
    return torch.randn(1, MELS, 100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.part}: {form.name} {form.settings or ''}")
def test_a_stored_form_is_equal_or_refused(form: Form, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    shutil.copytree(plain / form.part, folder)
    form.make(folder)
    config = config_of(form, folder, plain)
    if form.expected == EQUAL:
        with torch.no_grad():
            torch.testing.assert_close(ours(form, config), theirs(form, folder, plain), rtol=0, atol=1e-5)
        return
    with pytest.raises(ConfigError) as refusal:
        build_model(config)
    assert form.expected in str(refusal.value)
    assert str(folder) in str(refusal.value) or "experts" in str(refusal.value)


def test_a_folder_written_for_an_adapter_keeps_what_buffers_hold(plain: Path, tmp_path: Path) -> None:
    """As the base of a PEFT folder: transformers would fill a missing correction with zeros."""
    folder = save_parts(tmp_path / "parts")
    shutil.rmtree(folder / "llm")
    shutil.copytree(plain / "corrected", folder / "llm")
    save_tokenizer(NAMES["qwen"](), folder / "llm")
    run = trained(run_config(folder, "lora"))
    write_llm(load_model(save_final(run, tmp_path), merge_lora=False), tmp_path, run.card)
    written, expected = read(tmp_path), read(plain / "corrected")
    kept = [name for name in expected if name.endswith("correction_bias")]
    assert kept and all(torch.equal(written[name], expected[name]) for name in kept)


# Vocabularies


@dataclass(frozen=True)
class Words:
    """A base whose tokenizer has `surplus` tokens beyond its matrix, tuned in one way."""

    surplus: str
    tune: str
    expected: str
    new_tokens: tuple[str, ...] = ()
    sees: bool = False

    @property
    def row(self) -> str:
        added = f", new_tokens = {list(self.new_tokens)}" if self.new_tokens else ""
        seen = ", with [model.vision]" if self.sees else ""
        expected = self.expected if self.expected in (FITS, LEARNED, UNREAD) else f"refused: “{self.expected}”"
        cells = (f'{self.surplus} beyond the rows (`tune = "{self.tune}"{added}`{seen})', expected)
        return "| vocabulary | " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


FITS, LEARNED, UNREAD = (
    "trained as it is",
    "rows start as the mean and learn, which is said",
    "trained; a record that holds it is refused",
)
ENDS = "`<|im_start|>` and `<|im_end|>`"
LOST = "2 token(s) beyond the 420 rows of the embedding: '<|im_start|>' (420), '<|im_end|>' (421)"
BOTH = ("<|im_start|>", "<|im_end|>")
VOCABULARIES = [
    Words("nothing", "lora", FITS),
    Words(ENDS, "lora", LOST),
    Words(ENDS, "frozen", LOST),
    Words(ENDS, "full", LEARNED),
    Words(ENDS, "new_tokens", LEARNED, BOTH),
    Words(ENDS, "new_tokens", "1 token(s) beyond the 420 rows of the embedding: '<|im_end|>' (421)", BOTH[:1]),
    Words("`<image>`", "lora", FITS, sees=True),
    Words("`<image>`", "lora", "'<image>' (422)"),
    Words("the padding token", "lora", UNREAD),
]
ROWS = {"nothing": 422, ENDS: 420, "`<image>`": 422, "the padding token": 422}
"""Rows of the matrix; the tokenizer has 422 tokens, of which those that begin and end turns are the last."""
ADDED = {"`<image>`": "<image>", "the padding token": "<pad>"}


@pytest.mark.parametrize("words", VOCABULARIES, ids=lambda words: words.row)
def test_tokens_beyond_the_matrix_learn_or_are_refused(words: Words, plain: Path, tmp_path: Path) -> None:
    num_rows, tokenizer = ROWS[words.surplus], NAMES["qwen"]()
    if added := ADDED.get(words.surplus):
        tokenizer.add_tokens([AddedToken(added, special=True)], special_tokens=True)
        tokenizer.pad_token = added if added == "<pad>" else tokenizer.pad_token
    save_llm(tmp_path, "qwen2", vocab_size=num_rows)
    save_tokenizer(tokenizer, tmp_path)
    config = ModelConfig(LlmConfig(str(tmp_path), words.tune, words.new_tokens), dtype="float32")  # type: ignore[arg-type]
    if words.sees:
        config = replace(config, vision=VisionConfig(str(plain / "clip")), vision_projector=VisionProjectorConfig())
    tokens = load_tokenizer(str(tmp_path), words.new_tokens)
    if words.expected not in (FITS, LEARNED, UNREAD):
        with pytest.raises(ConfigError) as refusal:
            check_surplus(config, tokens, num_rows)
        assert words.expected in str(refusal.value) and str(tmp_path) in str(refusal.value)
        return
    found, vocabulary = check_surplus(config, tokens, num_rows), plan_vocabulary(config, tokens, num_rows)
    assert list(found.learned.values()) == ([420, 421] if words.expected == LEARNED else [])
    assert list(found.unread) == ([422] if words.expected == UNREAD else [])
    assert vocabulary.tuned_ids == ((420, 421) if words.tune == "new_tokens" else ())
    if words.expected == LEARNED:
        model = build_model(config, vocabulary=vocabulary)
        with torch.no_grad():
            rows = model.llm.get_input_embeddings()(torch.tensor([420, 421]))  # type: ignore[operator]
        expected = read(tmp_path)["model.embed_tokens.weight"].mean(0)
        torch.testing.assert_close(rows, expected.expand(2, -1), rtol=0, atol=1e-6)
        learns = {name for name, p in model.named_parameters() if p.requires_grad and p.shape[0] in (2, vocabulary.rows(num_rows))}
        assert learns and all("embed_tokens" in name or "lm_head" in name for name in learns)


def test_a_record_that_would_hold_an_unread_token_is_refused_by_name() -> None:
    """As of a template that writes its padding token."""
    tokenizer = NAMES["qwen"]()
    tokenizer.add_tokens([AddedToken("<pad>", special=True)], special_tokens=True)
    unread = frozenset(tokenizer.convert_tokens_to_ids(["<pad>"]))
    record = parse({"conversations": [{"from": "human", "value": "a <pad>"}, {"from": "gpt", "value": "b"}]}, "x:1", "x")
    template = load_template("auto", tokenizer, TemplateOptions(unread=unread))
    assert unread.isdisjoint(template.encode(record).input_ids)
    tokenizer.chat_template = "<pad>" + tokenizer.chat_template
    template = load_template("auto", tokenizer, TemplateOptions(unread=unread))
    with pytest.raises(RecordError, match="the template writes '<pad>', which has no row in the base's embedding"):
        template.encode(record)


# FP8


def test_any_rows_of_a_dequantised_matrix_are_those_of_the_whole_and_blocks_at_the_edges_may_be_short() -> None:
    """What each rank of a sharded load reads; transformers' loader refuses short blocks, its FP8 layers compute them like this."""
    codes = torch.randn(20, 27).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4) + 0.5
    found = dequantised_fp8("x", {"a": in_memory(codes), "a_scale_inv": in_memory(scales)}, {**FP8, "weight_block_size": [8, 8]})
    whole = codes.float() * scales.repeat_interleave(8, 0)[:20].repeat_interleave(8, 1)[:, :27]
    assert found.keys() == {"a"} and torch.equal(found["a"].all(), whole)
    for start in range(20):
        for stop in range(start, 21):
            assert torch.equal(found["a"].read(start, stop), whole[start:stop])


# The page


def table() -> str:
    """All forms, as the page shows them."""
    return "\n".join(["| part | stored as | outcome |", "|---|---|---|", *(form.row for form in (*FORMS, *VOCABULARIES))])


def test_the_page_holds_the_table() -> None:
    print(table())
    assert len(FORMS) + len(VOCABULARIES) >= 40
    assert table() in PAGE.read_text(), "write what this test prints into docs/stored_forms.md"
