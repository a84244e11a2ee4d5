"""Runs that start from earlier runs: what goes on, what is merged, what is refused; and what load_model gives back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.build import build_model
from model.card import read_card, write_card
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.exports.trained_files import trained_files
from model.files import proof
from model.load import card_without_init_from, load_model
from model.multimodal import MultimodalLM
from tests.support.finals import (
    NO_LORA,
    build,
    config_of,
    same,
    save_checkpoint,
    save_final,
    save_parts,
    trainable,
    trained,
    values,
)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return save_parts(tmp_path / "parts")


def start(config: ModelConfig, lora: LoraConfig = NO_LORA) -> MultimodalLM:
    return build(config, lora, seed=99).model


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
def test_lora_goes_on_from_lora(parts: Path, tmp_path: Path, save: object) -> None:
    before = trained(config_of(parts, "lora", "lora"))
    folder = save(before, tmp_path)  # type: ignore[operator]
    same(values(start(config_of(parts, "lora", "lora", init_from=str(folder)))), values(before.model))


def merged(run: MultimodalLM) -> dict[str, Tensor]:
    """Weights with the adapters in them, computed apart from the code under test."""
    found = {}
    named = values(run)
    for name, value in named.items():
        if name.endswith((".lora_A", ".lora_B")):
            continue
        path = name.removesuffix(".weight")
        if f"{path}.lora_A" in named:
            value = (
                value.double() + NO_LORA.alpha / NO_LORA.rank * named[f"{path}.lora_B"].double() @ named[f"{path}.lora_A"].double()
            )
        found[name] = value.float()
    return found


@pytest.mark.parametrize("tune", ["full", "frozen"])
@pytest.mark.parametrize("save", [save_final, save_checkpoint])
def test_lora_is_merged_where_it_does_not_go_on(parts: Path, tmp_path: Path, save: object, tune: str) -> None:
    before = trained(config_of(parts, "lora", "lora"))
    folder = save(before, tmp_path)  # type: ignore[operator]
    found, expected = values(start(config_of(parts, tune, "frozen", init_from=str(folder)))), merged(before.model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    base = load_file(parts / "llm" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert (found["llm.model.layers.0.self_attn.q_proj.weight"] - base).abs().max() > 1e-3


def test_full_then_lora_starts_equal_and_adapts_what_was_trained(parts: Path, tmp_path: Path) -> None:
    before = trained(config_of(parts, "full", "full"))
    found = values(start(config_of(parts, "lora", "frozen", init_from=str(save_final(before, tmp_path)))))
    same({n: v for n, v in found.items() if ".lora_" not in n}, values(before.model))
    assert all(not v.any() for n, v in found.items() if n.endswith(".lora_B"))
    assert all(v.abs().max() > 0 for n, v in found.items() if n.endswith(".lora_A"))


def test_a_third_stage_stands_on_both_before_it(parts: Path, tmp_path: Path) -> None:
    """A projector alone, then LoRA, then the projector alone again on the merged model: every stage's weights are there."""
    first = trained(config_of(parts, "frozen"), seed=1)
    first_final = str(save_final(first, tmp_path / "1"))
    second = trained(config_of(parts, "lora", init_from=first_final), seed=2)
    assert torch.equal(second.model.get_parameter("llm.lm_head.weight"), first.model.get_parameter("llm.lm_head.weight"))
    second_final = str(save_final(second, tmp_path / "2"))
    third = trained(config_of(parts, "frozen", init_from=second_final), seed=3)
    expected = merged(second.model)
    for name, value in values(third.model).items():
        if not name.startswith("vision_projector."):
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    final = save_final(third, tmp_path / "3")
    same(values(load_model(final)), values(third.model))


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
@pytest.mark.parametrize("save", [save_final, save_checkpoint])
def test_load_model_gives_what_was_trained(parts: Path, tmp_path: Path, save: object, tune: str) -> None:
    run = trained(config_of(parts, tune, tune))
    folder = save(run, tmp_path)  # type: ignore[operator]
    net = load_model(folder, merge_lora=False)
    same(values(net), values(run.model))
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.stop_ids == run.processor.stop_ids
    found, expected = values(load_model(folder)), merged(run.model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_a_moved_base_is_named_and_may_be_given(parts: Path, tmp_path: Path) -> None:
    folder = save_final(trained(config_of(parts, "lora")), tmp_path)
    moved = parts.with_name("moved")
    expected = values(load_model(folder))
    parts.rename(moved)
    with pytest.raises(ConfigError, match=r"model\.(llm|vision)\.path = .* is no folder"):
        load_model(folder)
    same(values(load_model(folder, base={"llm": str(moved / "llm"), "vision": str(moved / "vision")})), expected)
    with pytest.raises(ConfigError, match="base: 'audio' is not one of llm, vision, init_from"):
        load_model(folder, base={"audio": "x"})


def test_a_base_that_changed_since_is_refused(parts: Path, tmp_path: Path) -> None:
    folder = save_final(trained(config_of(parts, "lora")), tmp_path)
    tensors = load_file(parts / "llm" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, parts / "llm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"other weights than the ones this run was trained on"):
        load_model(folder)
    with pytest.raises(ConfigError, match=r"model\.llm\.path = .* holds other weights"):
        start(config_of(parts, "lora", init_from=str(folder)))


def test_a_finished_run_needs_no_adapter_or_projector_it_started_from(parts: Path, tmp_path: Path) -> None:
    before = save_final(trained(config_of(parts, "lora")), tmp_path / "1")
    lora = replace(NO_LORA, path=str(before))
    run = trained(config_of(parts, "lora", path=str(before)), lora)
    folder = save_final(run, tmp_path / "2")
    before.rename(tmp_path / "gone")
    same(values(load_model(folder, merge_lora=False)), values(run.model))
    assert load_model(folder)(run.processor([], answers=True))["text"].num_addends == 0


def test_a_run_that_holds_all_that_it_was_given_may_lose_its_origin(parts: Path, tmp_path: Path) -> None:
    """LLaVA's two stages: the second holds the first one's projector. A frozen model with a merged adapter holds nothing of it."""
    first = save_final(trained(config_of(parts, "frozen"), seed=1), tmp_path / "1")
    second = trained(config_of(parts, "lora", init_from=str(first)), seed=2)
    folder = save_final(second, tmp_path / "2")
    write_card(card_without_init_from(folder, read_card(folder)), folder)
    third = save_final(trained(config_of(parts, "frozen", init_from=str(folder)), seed=3), tmp_path / "3")
    assert card_without_init_from(third, read_card(third)) == read_card(third)
    first.rename(tmp_path / "gone")
    same(values(load_model(folder, merge_lora=False)), values(second.model))
    assert load_model(third).get_parameter("vision_projector.0.weight").shape == (32, 24)


def test_two_origins_of_one_part_are_an_error(parts: Path, tmp_path: Path) -> None:
    folder = str(save_final(trained(config_of(parts, "lora")), tmp_path))
    with pytest.raises(ConfigError, match=r"model\.vision_projector\.path and model\.init_from both hold the projector"):
        start(config_of(parts, "lora", init_from=folder, path=folder))
    with pytest.raises(ConfigError, match=r"lora\.path and model\.init_from both hold adapters"):
        start(config_of(parts, "lora", init_from=folder), replace(NO_LORA, path=folder))


def test_an_adapter_of_another_shape_is_merged_and_a_new_one_starts(parts: Path, tmp_path: Path) -> None:
    before = trained(config_of(parts, "lora"))
    found = values(start(config_of(parts, "lora", init_from=str(save_final(before, tmp_path))), LoraConfig(rank=4)))
    expected = merged(before.model)
    assert all(not v.any() for n, v in found.items() if n.endswith(".lora_B"))
    assert {v.shape[0] for n, v in found.items() if n.endswith(".lora_A")} == {4}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_a_new_adapter_never_takes_over_one_that_was_merged_long_ago(parts: Path, tmp_path: Path) -> None:
    """LoRA twice, then full: an adapter of the same shape after that starts from nothing."""
    first = save_final(trained(config_of(parts, "lora"), seed=1), tmp_path / "1")
    second = save_final(trained(config_of(parts, "lora", init_from=str(first)), seed=2), tmp_path / "2")
    third = trained(config_of(parts, "full", init_from=str(second)), seed=3)
    found = values(start(config_of(parts, "lora", init_from=str(save_final(third, tmp_path / "3")))))
    same({n: v for n, v in found.items() if ".lora_" not in n}, values(third.model))
    assert all(not v.any() for n, v in found.items() if n.endswith(".lora_B"))


def test_an_earlier_run_on_other_bases_is_refused(parts: Path, tmp_path: Path) -> None:
    folder = str(save_final(trained(config_of(parts, "lora")), tmp_path))
    other = save_parts(tmp_path / "other", "llama")
    with pytest.raises(ConfigError, match="was trained on another llm model"):
        start(config_of(other, "lora", init_from=folder))
    with pytest.raises(ConfigError, match=r"configure .model.vision. as well"):
        build_model(ModelConfig(LlmConfig(str(parts / "llm")), init_from=folder))


def test_a_damaged_checkpoint_and_a_folder_of_something_else_are_refused(parts: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(trained(config_of(parts, "lora")), tmp_path)
    file = folder / "rank-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"rank-00001-of-00002.safetensors was changed"):
        load_model(folder)
    with pytest.raises(ConfigError, match=r"is no final/ or checkpoint folder of ours: model\.json"):
        load_model(parts)


def test_first_values_depend_on_the_seed_and_the_name_alone(parts: Path) -> None:
    config = config_of(parts, "lora")
    first, again, other = (trainable(build(config, seed=seed).model) for seed in (1, 1, 2))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert name.endswith(".lora_B") or not torch.equal(value, other[name]), name
    assert len({v.flatten()[0].item() for n, v in first.items() if not n.endswith("lora_B")}) > 10


def _flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x40
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    r"lora\.safetensors is missing, but proof\.json lists it": lambda final: (final / "lora.safetensors").unlink(),
    r"vision-00002\.safetensors is not listed in proof\.json": lambda final: shutil.copy(
        final / "vision_projector.safetensors", final / "vision-00002.safetensors"
    ),
    r"lora\.safetensors is damaged: it has \d+ bytes, not the \d+": lambda final: os.truncate(final / "lora.safetensors", 999),
    r"lora\.safetensors is damaged: its checksum": lambda final: _flipped(final / "lora.safetensors"),
    r"final/proof\.json cannot be read": lambda final: (final / "proof.json").unlink(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_final_that_is_incomplete_or_damaged_is_refused_by_whoever_reads_it(parts: Path, tmp_path: Path, reason: str) -> None:
    """A tensor that is missing would fall through to the base's, and nobody would know."""
    final = save_final(trained(config_of(parts, "lora")), tmp_path)
    later = save_final(trained(config_of(parts, "frozen", init_from=str(final))), tmp_path / "later")
    DAMAGES[reason](final)
    for use in (
        lambda: load_model(final),
        lambda: load_model(later),
        lambda: trained_files(final, read_card(final)),
        lambda: start(config_of(parts, "lora", init_from=str(final))),
    ):
        with pytest.raises(ConfigError, match=reason):
            use()


def test_large_finals_are_read_twice_only_where_a_run_or_an_export_starts(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = save_final(trained(config_of(parts, "lora")), tmp_path)
    _flipped(final / "lora.safetensors")
    monkeypatch.setattr(proof, "QUICK_BYTES", 1)
    load_model(final)  # its size is right
    with pytest.raises(ConfigError, match="is damaged: its checksum"):
        start(config_of(parts, "lora", init_from=str(final)))
    facts = json.loads((final / "proof.json").read_text())
    for entry in facts["files"].values():
        del entry["size"]  # as earlier versions wrote it
    (final / "proof.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="is damaged: its checksum"):
        load_model(final)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer": -3}, r"model\.vision\.layer = -3, but .* was trained with -2"),
        ({"select": "cls_patch"}, r"model\.vision\.select = 'cls_patch', but .* was trained with 'patch'"),
        ({"kind": "linear"}, r"model\.vision_projector\.kind = 'linear', but .* was trained with 'mlp2x_gelu'"),
    ],
)
def test_a_projector_is_not_carried_over_to_other_features(
    parts: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = save_final(trained(config_of(parts, "frozen")), tmp_path)
    with pytest.raises(ConfigError, match=reason):
        start(config_of(parts, "frozen", init_from=str(folder), **changes))


def test_the_same_layer_counted_from_the_other_end_is_the_same(parts: Path, tmp_path: Path) -> None:
    run = trained(config_of(parts, "frozen"))
    found = start(config_of(parts, "frozen", init_from=str(save_final(run, tmp_path)), layer=2))
    same(values(found), values(run.model))


def test_other_preparation_of_pictures_is_refused_with_both_values(parts: Path, tmp_path: Path) -> None:
    folder = save_final(trained(config_of(parts, "frozen")), tmp_path)
    file = parts / "vision" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_factor": 1.0}))
    with pytest.raises(ConfigError, match=r"image rescale = 1\.0, but .* was trained with 0\.0039"):
        start(config_of(parts, "frozen", init_from=str(folder)))
