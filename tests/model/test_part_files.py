"""Parts are read from every file that holds them: exports of ours, forms of single matrices, modules that PEFT saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.audio.projector import build_audio_projector
from model.config import AudioConfig, AudioProjectorConfig, LoraConfig, StateHeadConfig, VisionProjectorConfig
from model.errors import ConfigError
from model.load import load_model
from model.vision.projector import build_vision_projector
from model.weights.projector_files import whole_projector
from tests.support.finals import build, config_of, same, save_final, save_parts, trained, values
from tests.support.tiny_audio import save_whisper
from tools.export_adapter import main as export


def of(model: torch.nn.Module, part: str) -> dict[str, Any]:
    return {name: rows for name, rows in values(model).items() if name.startswith(f"{part}.")}


@pytest.mark.parametrize("tune", ["positions", pytest.param("full", marks=pytest.mark.long)])
def test_what_a_tower_learned_is_read_on_top_of_its_base(tmp_path: Path, tune: str) -> None:
    config = config_of(save_parts(tmp_path), "lora", tune)
    run = trained(config)
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "out")]) == 0
    assert config.vision is not None
    for path in (tmp_path / "out" / "vision.safetensors", tmp_path / "out"):
        vision = replace(config.vision, weights=str(path), tune="frozen")
        again = build(replace(config, vision=vision), replace(run.card.lora, path=str(tmp_path / "out")), seed=9)
        same(of(again.model, "vision"), of(run.model, "vision"))
    final = save_final(again, tmp_path / "again")  # what was read stays where it is, as a base does
    same(of(load_model(final, merge_lora=False), "vision"), of(run.model, "vision"))
    tensors = load_file(tmp_path / "out" / "vision.safetensors")
    save_file({**tensors, "tower.head.weight": torch.ones(2)}, tmp_path / "out" / "vision.safetensors")
    with pytest.raises(ConfigError, match=r"holds 'vision\.tower\.head\.weight', which the part has not"):
        build(replace(config, vision=replace(config.vision, weights=str(tmp_path / "out"))))


def test_a_state_head_and_a_sound_projector_are_read_from_an_export(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    save_whisper(parts / "audio")
    heard = {"audio": AudioConfig(str(parts / "audio")), "audio_projector": AudioProjectorConfig("linear")}
    config = replace(config_of(parts, "frozen"), **heard, state_head=StateHeadConfig(3))  # type: ignore[arg-type]
    run = trained(config)
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "out")]) == 0
    named = {
        part: replace(getattr(config, part), path=str(tmp_path / "out"), tune="frozen")
        for part in ("vision_projector", "audio_projector", "state_head")
    }
    same(values(build(replace(config, **named), seed=9).model), values(run.model))
    wrong = replace(named["state_head"], classes=4)
    with pytest.raises(ConfigError, match=r"state_head\.weight: \[3, 32\] in the file, \[4, 32\]"):
        build(replace(config, **{**named, "state_head": wrong}))


SINGLE = {"weight": (32, 24), "bias": (32,)}


@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("part", ["vision_projector", "audio_projector"])
def test_a_single_matrix_is_read_with_and_without_a_number_in_front(tmp_path: Path, part: str, prefix: str) -> None:
    stored = {prefix + name: torch.randn(shape) for name, shape in SINGLE.items()}
    save_file(stored, tmp_path / f"{part}.safetensors")
    modules: dict[str, Any] = {
        "vision_projector": build_vision_projector(VisionProjectorConfig("linear"), 24, 32),
        "audio_projector": build_audio_projector(AudioProjectorConfig("linear"), 24, 32),
    }
    found = whole_projector(tmp_path, part, modules[part])
    assert {name.rpartition(".")[2]: rows.all().tolist() for name, rows in found.items()} == {
        name.rpartition(".")[2]: rows.tolist() for name, rows in stored.items()
    }


@pytest.mark.parametrize("prefix", [pytest.param("", marks=pytest.mark.long), "model."])
def test_a_projector_that_peft_saved_whole_is_read_beside_its_adapter(tmp_path: Path, prefix: str) -> None:
    """train-llava's folders: the adapter and, by modules_to_save, the projector."""
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0)
    parts = save_parts(tmp_path, vocab_size=448)
    run = trained(config_of(parts), lora)
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "peft"), "--for", "peft"]) == 0
    projector = {name.removeprefix("vision_projector."): rows for name, rows in of(run.model, "vision_projector").items()}
    layers = {"0": "linear_1", "2": "linear_2"}
    name = f"base_model.model.{prefix}multi_modal_projector."
    saved = {f"{name}{layers[n[0]]}{n[1:]}": rows.contiguous() for n, rows in projector.items()}
    file, described = tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "peft" / "adapter_config.json"
    save_file({**load_file(file), **saved}, file)
    described.write_text(json.dumps({**json.loads(described.read_text()), "modules_to_save": ["multi_modal_projector"]}))
    adapter = replace(lora, path=str(tmp_path / "peft"))
    with pytest.raises(ConfigError, match="saved modules as well, with the projector"):
        build(config_of(parts), adapter)
    again = build(config_of(parts, path=str(tmp_path / "peft")), adapter, seed=9)
    for part in ("llm", "vision_projector"):
        same(of(again.model, part), of(run.model, part))


@pytest.mark.parametrize("form", ["safetensors", "peft"])
def test_an_adapter_of_the_base_is_merged_where_the_base_is_read(tmp_path: Path, form: str) -> None:
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0, rslora=True)
    config = config_of(save_parts(tmp_path, vocab_size=448))
    final = save_final(trained(config, lora), tmp_path)
    assert export([str(final), str(tmp_path / "out"), "--for", form]) == 0
    merged = of(load_model(final), "llm")
    base = replace(config, llm=replace(config.llm, tune="frozen", adapter=str(tmp_path / "out")))
    run = build(base)
    same(of(run.model, "llm"), merged)
    same(of(load_model(save_final(run, tmp_path / "again")), "llm"), merged)
    more = build(replace(base, llm=replace(base.llm, tune="lora")))  # another adapter learns on top
    same({name: rows for name, rows in of(more.model, "llm").items() if "lora_" not in name}, merged)
    other = config_of(save_parts(tmp_path / "other", hidden_size=64))
    with pytest.raises(ConfigError, match=r"model\.llm\.adapter = .* adapts llm\..* is \[64, 48\] in the base"):
        build(replace(other, llm=replace(other.llm, adapter=str(tmp_path / "out"))))
    with pytest.raises(ConfigError, match=r"model\.llm\.adapter = .*none' holds no adapter_model"):
        build(replace(config, llm=replace(config.llm, adapter=str(tmp_path / "none"))))
