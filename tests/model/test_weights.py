"""Every weight comes from the newest place that holds it, to the bit; what is missing or does not fit is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel

from model.build import assemble, build_model
from model.card import make_card
from model.config import LlmConfig, ModelConfig
from model.errors import ConfigError
from model.files.tensor_files import in_memory, read_weights
from model.llm.causal_lm import VocabularyLayout
from model.weights.initial_values import grow_embedding
from model.weights.materialise import parameters_on_meta
from tests.support.finals import NO_LORA, build, config_of, same, save_parts, values
from tests.support.tiny import LLMS, VOCAB, save_llm


def llm_only(folder: Path, tune: str = "full", **options: object) -> ModelConfig:
    return ModelConfig(LlmConfig(str(folder), tune), dtype="float32", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", LLMS)
def test_a_model_from_meta_equals_from_pretrained_buffers_included(tmp_path: Path, family: str) -> None:
    save_llm(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = build_model(llm_only(tmp_path)).llm
    same(values(ours), values(plain))
    same(dict(ours.named_buffers()), dict(plain.named_buffers()))
    assert len(dict(ours.named_buffers())) > 0 and not any(b.is_meta for b in ours.buffers())


def test_a_tower_from_meta_has_its_buffers_and_the_structure_costs_no_memory(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    config = config_of(parts, "full")
    card = make_card(config, NO_LORA, VocabularyLayout())
    assert all(p.is_meta for p in assemble(card, torch.float32).parameters())
    plain = CLIPVisionModel.from_pretrained(parts / "vision", dtype=torch.float32)
    ours = build_model(config).get_submodule("vision.tower")
    same(dict(ours.named_buffers()), dict(plain.named_buffers()))
    assert dict(ours.named_buffers())


def test_after_an_error_modules_are_built_as_ever() -> None:
    with pytest.raises(RuntimeError), parameters_on_meta():
        raise RuntimeError
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_frozen_weights_have_the_compute_dtype_and_trainable_ones_float32(tmp_path: Path) -> None:
    run = build(config_of(save_parts(tmp_path), "lora", "frozen", dtype="bfloat16"))
    for name, parameter in run.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    exact = load_file(tmp_path / "llm" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(run.model.get_parameter("llm.model.norm.weight"), exact.bfloat16())


def write_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def write_shards(folder: Path) -> None:
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for k in range(3):
        file = f"model-{k + 1:05d}-of-00003.safetensors"
        save_file(dict(tensors[k::3]), folder / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in tensors[k::3]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("write", [write_bin, write_shards])
def test_folders_of_other_forms_give_the_same_weights(tmp_path: Path, write: object, caplog: pytest.LogCaptureFixture) -> None:
    save_llm(tmp_path)
    expected = values(build_model(llm_only(tmp_path)))
    write(tmp_path)  # type: ignore[operator]
    same(values(build_model(llm_only(tmp_path))), expected)
    assert ("weights_only=True" in caplog.text) == (write is write_bin)


def test_a_bin_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    save_llm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        build_model(llm_only(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_an_index_may_not_name_files_elsewhere_or_files_that_are_gone(tmp_path: Path) -> None:
    save_llm(tmp_path)
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00003.safetensors is missing"):
        build_model(llm_only(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(ConfigError, match="names files outside its folder"):
        build_model(llm_only(tmp_path))


def test_missing_tensors_and_wrong_shapes_are_all_named(tmp_path: Path) -> None:
    save_llm(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 2)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError) as error:
        build_model(llm_only(tmp_path))
    assert "no value for llm.model.norm.weight" in str(error.value) and str(tmp_path) in str(error.value)
    assert "llm.model.layers.1.mlp.up_proj.weight: [3, 2] in the file, [48, 32] in the model" in str(error.value)


# Rows of the vocabulary


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_new_tokens_get_the_mean_and_known_rows_stay_to_the_bit(tmp_path: Path, family: str) -> None:
    save_llm(tmp_path, family)
    plain = load_file(tmp_path / "model.safetensors")
    vocabulary = VocabularyLayout(size=VOCAB + 2, num_known=VOCAB, new_ids=(VOCAB, VOCAB + 1))
    model = build_model(llm_only(tmp_path, "frozen"), None, vocabulary)
    names = ["model.embed_tokens.weight"] + (["lm_head.weight"] if family == "qwen2" else [])
    for name in names:
        matrix = model.llm.get_parameter(name)
        assert matrix.shape[0] == 384
        assert torch.equal(matrix[:VOCAB], plain[name])
        mean = plain[name].double().mean(0).float()
        torch.testing.assert_close(matrix[VOCAB:], mean.expand(64, -1), rtol=1e-6, atol=1e-8)
    assert model.llm.config.vocab_size == 384  # type: ignore[union-attr]
    assert (model.llm.get_output_embeddings().weight is model.llm.get_input_embeddings().weight) == (family == "qwen2_tied")  # type: ignore[operator]


def test_spare_rows_of_the_base_are_used_and_not_part_of_the_mean(tmp_path: Path) -> None:
    save_llm(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    vocabulary = VocabularyLayout(size=302, num_known=300, new_ids=(300, 301))
    found = build_model(llm_only(tmp_path, "frozen"), None, vocabulary).llm.get_parameter("model.embed_tokens.weight")
    assert found.shape[0] == VOCAB
    kept = [i for i in range(VOCAB) if i not in (300, 301)]
    assert torch.equal(found[kept], plain[kept])
    torch.testing.assert_close(found[300:302], plain[:300].double().mean(0).float().expand(2, -1), rtol=1e-6, atol=1e-8)


def test_a_token_that_the_base_knows_already_keeps_its_row(tmp_path: Path) -> None:
    save_llm(tmp_path)
    found = build_model(llm_only(tmp_path, "frozen"), None, VocabularyLayout(size=VOCAB, num_known=VOCAB))
    assert torch.equal(found.llm.get_parameter("lm_head.weight"), load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_any_rows_of_a_grown_matrix_are_those_of_the_whole() -> None:
    base = torch.randn(10, 3, dtype=torch.bfloat16)
    rows = grow_embedding(in_memory(base), 16, VocabularyLayout(12, 9, (9, 11)), (9, 11))
    whole = rows.all()
    assert torch.equal(whole[:9], base[:9].float())
    for start in range(16):
        for stop in range(start, 17):
            assert torch.equal(rows.read(start, stop), whole[start:stop])


def test_a_legacy_bin_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.bin")["a"].all().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("a.bin", {"a": torch.ones(2), "epoch": 3}, r"a\.bin holds more than tensors: 'epoch' \(int\)"),
        ("a.bin", [torch.ones(2)], r"a\.bin holds a list, not tensors by name"),
        ("a.bin", torch.ones(2), r"a\.bin holds a Tensor, not tensors by name"),
    ],
)
def test_a_bin_that_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, name: str, value: object, reason: str) -> None:
    torch.save(value, tmp_path / name)
    with pytest.raises(ConfigError, match=reason):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["a.safetensors", "zip.bin", "legacy.bin"])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, kind: str, share: float) -> None:
    file, tensors = tmp_path / kind, {"a": torch.ones(500)}
    if kind == "a.safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "zip.bin")
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(ConfigError, match=rf"{kind} is cut short"):
        read_weights(file)
