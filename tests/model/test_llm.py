"""Our decoder without masks and our loss of supervised rows equal the plain Hugging Face model with its own mask and loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import loss
from model.batch import IGNORE_INDEX
from model.errors import ConfigError
from model.files.hub import decoded, hugging_face_config
from model.llm import attention
from model.llm.causal_lm import VocabularyLayout, build_llm, check_causal, check_positions, head_weight, positions_note
from model.llm.interface import CausalLM
from tests.support.llm import BASE, TOLERANCE, batch, gradients, ours, theirs
from tests.support.tiny import LLMS, SIZES, VOCAB, save_llm


@pytest.mark.parametrize("family", LLMS)
def test_hidden_states_of_real_tokens_equal_those_under_a_mask(tmp_path: Path, family: str) -> None:
    save_llm(tmp_path, family)
    data, plain = batch(), theirs(tmp_path)
    real = data.attention_mask.bool()  # type: ignore[union-attr]
    with torch.no_grad():
        expected = plain(input_ids=data.input_ids, attention_mask=data.attention_mask).logits[real]
        model = ours(tmp_path)
        assert model.llm.config._attn_implementation == attention.NAME
        embeds = model.embed(data)
        hidden = model.llm.get_decoder()(inputs_embeds=embeds, position_ids=data.position_ids, use_cache=False).last_hidden_state
        found = (hidden @ head_weight(model.llm).T)[real]
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("family", LLMS)
def test_loss_and_every_gradient_equal_those_of_full_logits(
    tmp_path: Path, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llm(tmp_path, family)
    data = batch()
    monkeypatch.setattr(loss.HeadOptions.__init__, "__defaults__", (5, loss.UNCHANGED, None))  # chunks of 5 rows, the last not full
    assert data.num_supervised > 5 and data.num_supervised % 5
    model, plain = ours(tmp_path, name), theirs(tmp_path)
    term = model(data)["text"]
    term.sum.backward()
    logits = plain(input_ids=data.input_ids, attention_mask=data.attention_mask).logits
    expected = F.cross_entropy(logits.flatten(0, 1), data.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    expected.backward()
    torch.testing.assert_close(term.sum, expected, **TOLERANCE)
    assert term.num_addends == data.num_supervised
    found, wanted = gradients(model), gradients(plain)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_a_batch_without_supervision_gives_every_parameter_a_gradient_of_zeros(tmp_path: Path, family: str) -> None:
    model = ours(save_llm(tmp_path, family))
    term = model(batch(0.0))["text"]
    assert term.sum.item() == 0.0 and term.num_addends == 0
    term.sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_tied_matrices_are_one_parameter_and_untied_ones_two(tmp_path: Path) -> None:
    for family, count in (("qwen2_tied", 1), ("qwen2", 2)):
        model = ours(save_llm(tmp_path / family, family))
        head, embeddings = head_weight(model.llm), model.llm.get_input_embeddings().weight  # type: ignore[operator]
        assert len({id(head), id(embeddings)}) == count
        assert sum(p.shape == (VOCAB, 32) for p in model.parameters()) == count


def test_our_attention_refuses_what_it_cannot_honour(tmp_path: Path) -> None:
    model, data = ours(save_llm(tmp_path)), batch()
    with pytest.raises(ValueError, match="no mask, no cache"):
        model.llm(inputs_embeds=model.embed(data), attention_mask=torch.zeros(3, 1, 21, 21), use_cache=False)


@pytest.mark.parametrize("name", ["flash_typo", "Varlen"])
def test_an_attention_nobody_knows_is_a_configuration_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.attention = '{name}'"):
        ours(save_llm(tmp_path), name)


def test_rows_of_the_vocabulary() -> None:
    assert VocabularyLayout().rows(320) == 320
    assert VocabularyLayout(size=320).rows(320) == 320
    assert VocabularyLayout(size=100).rows(320) == 320
    assert VocabularyLayout(size=321).rows(320) == 384
    assert VocabularyLayout(size=384).rows(320) == 384


@pytest.mark.parametrize("kind", ["bloom", "xglm", "falcon", "gpt_neox_japanese", "trocr", "mvp", "granite_swa"])
def test_our_attention_is_refused_where_it_would_not_be_used(kind: str) -> None:
    """These would see the future without a mask, or fail with a KeyError."""
    with pytest.raises(ConfigError, match=r"model\.attention = 'sdpa': .* use model\.attention = 'eager'"):
        build_llm({"model_type": kind, **BASE}, "sdpa", VocabularyLayout())


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma", "cohere"])
def test_models_are_what_their_type_says(kind: str) -> None:
    """`CausalLM` is a cast: the models behind it have each of its members, and they are of the kinds it names."""
    llm: Any = build_llm({"model_type": kind, **BASE, "num_key_value_heads": 4, "pad_token_id": 0}, "sdpa", VocabularyLayout())
    members = [name for name in (*vars(CausalLM), *CausalLM.__annotations__) if not name.startswith("__")]
    assert len(members) == 10 and all(hasattr(llm, name) for name in members)
    assert type(llm.get_output_embeddings()) is nn.Linear and isinstance(llm.get_input_embeddings(), nn.Embedding)
    assert getattr(llm, llm.base_model_prefix) is llm.get_decoder() is not llm
    assert not isinstance(llm, CausalLM)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "stablelm", "opt", "phi3", "gemma", "olmo2", "qwen3", "biogpt"])
def test_no_position_sees_the_future_in_other_families(kind: str) -> None:
    torch.manual_seed(0)
    llm: Any = build_llm(
        {"model_type": kind, **BASE, "num_key_value_heads": 4, "pad_token_id": 0}, "sdpa", VocabularyLayout()
    ).eval()
    embeds = torch.randn(1, 9, 32)
    changed = torch.cat([embeds[:, :-1], torch.randn(1, 1, 32)], 1)
    with torch.no_grad():
        first, second = (llm.get_decoder()(inputs_embeds=e, use_cache=False).last_hidden_state for e in (embeds, changed))
    torch.testing.assert_close(first[:, :-1], second[:, :-1])
    assert (first[:, -1] - second[:, -1]).abs().max() > 1e-3


def test_a_layer_that_is_not_causal_or_has_sinks_is_refused(tmp_path: Path) -> None:
    llm = ours(save_llm(tmp_path)).llm
    check_causal(llm, "sdpa")
    layer: Any = llm.get_submodule("model.layers.1.self_attn")
    layer.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ConfigError, match=r"drops the attention sinks of Qwen2ForCausalLM \(model\.layers\.1\.self_attn\.sinks\)"):
        check_causal(llm, "sdpa")
    check_causal(llm, "eager")
    layer.is_causal = False
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn of Qwen2ForCausalLM is not causal"):
        check_causal(llm, "sdpa")


def test_code_of_a_folder_is_never_run_and_not_needed_where_transformers_knows_the_type(tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    for name in ("configuration_x", "modeling_x"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    config = hugging_face_config("model.llm.path", {"model_type": "phi3", "hidden_size": 48, "auto_map": own})
    assert (type(config).__name__, config.hidden_size) == ("Phi3Config", 48)
    with pytest.raises(ConfigError, match=r"wants code of its own .* knows no model_type 'qwen_of_old'"):
        hugging_face_config("model.llm.path", {"model_type": "qwen_of_old", "auto_map": own})


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_type", "rope", "limit"), [("phi3", LONG, 64), ("llama", {"rope_type": "dynamic", "factor": 2.0}, 512)]
)
def test_lengths_at_which_angles_depend_on_the_longest_sample_are_refused(model_type: str, rope: Any, limit: int) -> None:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "original_max_position_embeddings": 64}
    value = {"model_type": model_type, **SIZES, **tokens, "rope_parameters": {"rope_theta": 1e4, **rope}}
    check_positions(value, limit)
    with pytest.raises(ConfigError, match=f"{rope['rope_type']}.* longer than {limit} tokens.*set data.max_length = {limit} or"):
        check_positions(value, limit + 1)
    check_positions({"model_type": "llama", **SIZES}, 100_000)


def test_lengths_beyond_a_models_positions_are_refused_for_tables_and_told_for_rotations() -> None:
    for kind in ("gpt2", "opt", "gptj"):
        limit = hugging_face_config("x", {"model_type": kind}).max_position_embeddings
        check_positions({"model_type": kind}, limit)
        with pytest.raises(
            ConfigError, match=rf"whose {kind} has a table of {limit} positions: .* set data.max_length = {limit} or"
        ):
            check_positions({"model_type": kind}, limit + 1)
    llama = {"model_type": "llama", "max_position_embeddings": 512}
    assert positions_note(llama, 512) == ""
    assert positions_note(llama, 513).startswith("data.max_length = 513 is more than the 512 positions that the language model was")
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    assert (
        positions_note({**llama, "rope_parameters": rope}, 2048) == "" != positions_note({**llama, "rope_parameters": rope}, 2049)
    )
    assert positions_note({"model_type": "bloom"}, 10**6) == ""


def test_numbers_that_json_has_not_are_read_as_transformers_writes_them() -> None:
    """As the limits of Granite 4's and Bamba's time steps."""
    value = {"limits": [0.0, {"__float__": "Infinity"}], "part": {"low": {"__float__": "-Infinity"}}, "other": {"__float__": "x"}}
    inf = float("inf")
    assert decoded(value) == {"limits": [0.0, inf], "part": {"low": -inf}, "other": {"__float__": "x"}}
