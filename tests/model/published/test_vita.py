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
from safetensors.torch import load_file, save_file

from model.audio.encoder import audio_config
from model.config import AudioConfig
from model.errors import ConfigError
from model.load import load_model
from model.published.table import published_settings
from tests.support.finals import config_of, one_process, save_final, save_parts, trained
from tests.support.tiny_audio import wave
from tests.support.tiny_media import wav
from tests.support.vita import SOUND, TOWER, expected_logits, save_vita
from tools.export_adapter import main as export
from tools.exports.proofs import logits
from trainer.config import RunConfig
from trainer.main import run
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


@pytest.mark.parametrize(("kind", "sound"), [("1.5", True), ("1.0", True), pytest.param("1.5", False, marks=pytest.mark.long)])
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
    with pytest.raises(ConfigError, match=r"model\.vision\.layer = -2, but .*, VITA, has -1: remove the line"):
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


def trained_run(folder: Path, tmp_path: Path, steps: int) -> Path:
    """The final/ folder of a run from the published model: without training, or all parts trained."""
    text = json.dumps([record(tmp_path, True) for _ in range(2)])
    (tmp_path / "train.json").write_text(text.replace(f"{tmp_path}/", ""))
    tune = {part: {"tune": "full"} for part in ("llm", "vision", "vision_projector", "audio", "audio_projector")}
    sections = {
        "model": {"init_from": str(folder), "dtype": "float32", **tune},
        "data": {"sources": [{"path": str(tmp_path / "train.json"), "media_root": str(tmp_path)}], "workers": 0},
        "batch": {"global_batch_size": 2, "micro_batch_size": 1},
        "optim": {"lr": 1e-2},
        "train": {"max_steps": steps},
    }
    config = run_from(folder, tmp_path / f"run{steps}", **sections)
    with one_process() as world:
        assert run(config, world) == 0
    return tmp_path / f"run{steps}" / "final"


@pytest.mark.parametrize("kind", [pytest.param("1.5", marks=pytest.mark.long), "duplex", "1.0"])
def test_what_comes_in_goes_out_the_same(tmp_path: Path, kind: str) -> None:
    """Without training every tensor is the same to the bit, in the whole files and in the folders that config.json names."""
    folder, out = tmp_path / "published", tmp_path / "out"
    tensors = save_vita(folder, kind)
    assert export([str(trained_run(folder, tmp_path, 0)), str(out), "--for", "vita"]) == 0
    found = load_file(out / "model.safetensors")
    assert found.keys() == tensors.keys() and ("predictor_head.bias" in found) is (kind == "duplex")
    assert [name for name in found if not torch.equal(found[name], tensors[name])] == []
    stored = torch.load(out / "audio_encoder" / "final.pt", weights_only=True)
    assert {f"model.audio_encoder.{name}": rows.tolist() for name, rows in stored.items()} == {
        name: rows.tolist() for name, rows in tensors.items() if name.startswith("model.audio_encoder.")
    }
    tower = load_file(out / "InternViT" / "model.safetensors")
    assert tower.keys() == load_file(folder / TOWER / "model.safetensors").keys()
    if kind == "duplex":
        assert json.loads((out / "config.json").read_text())["audio_prompt_num"] == 5
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (out, folder))
    assert {key: ours[key] for key in ("model_type", "architectures", "vocab_size", "mm_hidden_size")} == {
        key: theirs[key] for key in ("model_type", "architectures", "vocab_size", "mm_hidden_size")
    }
    tokenizers = [json.loads((place / "tokenizer.json").read_text())["added_tokens"] for place in (out, folder)]
    assert tokenizers[0] == tokenizers[1]
    settings = [audio_config(AudioConfig(str(place))) for place in (out, folder)]
    assert settings[0].keys() == settings[1].keys()
    for key, value in settings[0].items():
        assert value == (pytest.approx(settings[1][key], rel=1e-12) if isinstance(value, list) else settings[1][key])


def test_what_was_trained_goes_out_and_comes_in_again(tmp_path: Path) -> None:
    folder, out = tmp_path / "published", tmp_path / "out"
    tensors = save_vita(folder)
    final = trained_run(folder, tmp_path, 2)
    assert export([str(final), str(out), "--for", "vita"]) == 0
    found = load_file(out / "model.safetensors")
    fixed = ("encoder.global_cmvn.mean", "encoder.global_cmvn.istd")
    assert found.keys() == tensors.keys()
    assert [name for name in found if torch.equal(found[name], tensors[name]) and not name.endswith(fixed)] == []
    with started(out, tmp_path) as (data, model):
        batch = data.processor([record(tmp_path, True)], answers=True)
        rows = len(tensors["lm_head.weight"])  # those behind them are our placeholders', new and never read
        again, expected = logits(model, batch), logits(load_model(final).eval(), batch)
    torch.testing.assert_close(again[:, :rows], expected[:, :rows], rtol=1e-5, atol=1e-5)


def test_what_vita_cannot_hold_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ = trained(config_of(save_parts(tmp_path / "parts"), "lora"), image_fit="anyres")
    assert export([str(save_final(run_, tmp_path)), str(tmp_path / "out"), "--for", "vita"]) == 2
    said = capsys.readouterr().err
    for words in (
        "'clip_vision_model' is no InternViT",
        "kind = 'mlp2x_gelu': VITA has 'vita_mlp'",
        "layer = -2",
        "image_fit = 'anyres'",
    ):
        assert words in said
    assert not (tmp_path / "out").exists()


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
