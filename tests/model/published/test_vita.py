"""VITA 1.0 and 1.5 as the start of a run: what their definition computes is what the run computes, with pictures and sound.

The comparison with VITA's own code is in docs/exchange.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from model.errors import ConfigError
from model.published.table import published_settings
from tests.support.finals import one_process
from tests.support.tiny_audio import wave
from tests.support.tiny_media import wav
from tests.support.vita import SOUND, TOWER, expected_logits, save_vita
from tools.exports.proofs import logits
from trainer.config import RunConfig
from trainer.records.run_data import open_data
from trainer.runfile.load import parse_config
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage
from trainer.setup import build_run

FOLLOWS = {
    "model.vision.layer": -1,
    "model.vision_projector.kind": "vita_mlp",
    "model.audio_projector.kind": "vita_conv",
    "data.image_fit": "tiles",
    "data.max_tiles": 12,
}


def run_from(folder: Path, output: Path, **sections: Any) -> RunConfig:
    tables = {"output_dir": str(output), "model": {"init_from": str(folder), "dtype": "float32"}, "train": {"max_steps": 0}}
    return parse_config({**tables, **sections}, "test")


def record(folder: Path, sound: bool) -> dict[str, Any]:
    """Two turns: an odd picture and a clip, then a clip, or words."""
    image = Image.effect_noise((70, 41), 80).convert("RGB")
    image.save(folder / "p.png")
    parts: list[list[dict[str, Any]]] = [[{"type": "image", "path": str(folder / "p.png")}], [{"type": "text", "text": "And now?"}]]
    if sound:
        for i, seconds in enumerate((0.3, 0.86)):
            (folder / f"{i}.wav").write_bytes(wav(wave(seconds).numpy()[:, None], 16_000))
            parts[i].append({"type": "audio", "path": str(folder / f"{i}.wav")})
    answers = [[{"type": "text", "text": text}] for text in ("A thing.", "A word.")]
    turns = [{"role": role, "content": c} for two in zip(parts, answers) for role, c in zip(("user", "assistant"), two)]
    return {"messages": turns}


@contextmanager
def started(folder: Path, tmp_path: Path, **sections: Any) -> Iterator[tuple[Any, Any]]:
    config = run_from(folder, tmp_path / "run", **sections)
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        yield data, build_run(Stage(config, config), data, world).model.eval()


@pytest.mark.parametrize(("kind", "sound"), [("1.5", True), ("1.0", True), ("1.5", False)])
def test_logits_are_those_of_its_definition(tmp_path: Path, kind: str, sound: bool) -> None:
    folder = tmp_path / "published"
    tensors = save_vita(folder, kind, sound)
    with started(folder, tmp_path) as (data, model):
        batch = data.processor([record(tmp_path, sound)], answers=True)
    assert batch.media["image"].values.shape == (7, 3, 32, 32)  # 3 x 2 tiles and the whole picture
    assert ("audio" in batch.media) is sound
    expected = expected_logits(folder, tensors, batch)
    torch.testing.assert_close(logits(model, batch)[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)


def test_what_follows_from_it_is_filled_in(tmp_path: Path) -> None:
    save_vita(tmp_path / "published")
    tables = to_tables(run_from(tmp_path / "published", tmp_path / "run"))
    assert {key: value_of(tables, key) for key in FOLLOWS} == FOLLOWS
    assert value_of(tables, "data.template") == "vita_qwen" and value_of(tables, "model.init_from") == ""
    with pytest.raises(ConfigError, match=r"model\.vision\.layer = -2, but .* is a VITA with -1: remove the line"):
        run_from(
            tmp_path / "published", tmp_path / "run", model={"init_from": str(tmp_path / "published"), "vision": {"layer": -2}}
        )


def test_what_the_whole_files_leave_out_comes_from_the_folders_that_they_name(tmp_path: Path) -> None:
    """VITA's own code takes a frozen sound encoder, and a frozen tower, from there."""
    folder = tmp_path / "published"
    tensors = save_vita(folder)
    own = {name: rows for name, rows in tensors.items() if ".audio_encoder." not in name and ".vision_tower." not in name}
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    tables = to_tables(run_from(folder, tmp_path / "run"))
    places = {part: value_of(tables, f"model.{part}.path") for part in ("vision", "audio", "audio_projector", "vision_projector")}
    sound = str(folder / SOUND)
    assert places == {"vision": str(folder / TOWER), "audio": sound, "audio_projector": sound, "vision_projector": str(folder)}
    with started(folder, tmp_path) as (data, model):
        batch = data.processor([record(tmp_path, True)], answers=True)
    expected = expected_logits(folder, tensors, batch)
    torch.testing.assert_close(logits(model, batch)[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    tensors = save_vita(folder)

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message), started(folder, tmp_path):
            pass

    change(folder / "config.json", mm_projector_type="ldp")
    refused("mm_projector_type = 'ldp' in config.json, MobileVLM's convolutions, is not supported")
    change(folder / "config.json", mm_projector_type="mlp2x_gelu", mm_audio_encoder="/nowhere/else")
    refused("config.json names mm_audio_encoder = '/nowhere/else', and there is no such folder with train.yaml: put it into")
    change(folder / "config.json", mm_audio_encoder=SOUND)
    settings = folder / SOUND / "train.yaml"
    settings.write_text(settings.read_text().replace("adpter_type: subsampling", "adpter_type: cnn"))
    refused("model_conf.adpter_type = 'cnn' is not supported: it normalises by statistics of its batch")
    settings.write_text(settings.read_text().replace("adpter_type: cnn", "adpter_type: subsampling"))
    change(folder / TOWER / "config.json", model_type="siglip_vision_model")
    refused("its vision tower is 'siglip_vision_model', of which VITA makes other rows")
    change(folder / TOWER / "config.json", model_type="intern_vit_6b")
    save_file({**tensors, "model.audio_encoder.adpter.bn1.weight": torch.ones(2)}, folder / "model.safetensors")
    refused("VITA has no place for .*adpter.bn1.weight")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"is VITA's sound encoder alone: name it as model\.audio\.path"):
        published_settings(str(folder / SOUND))
