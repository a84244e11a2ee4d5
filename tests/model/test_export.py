"""Parts and projectors handed over: what was trained, under the names its readers know, and never more read than is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.build import build_model
from model.files import tensor_files
from tests.support.finals import (
    NO_LORA,
    Run,
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
from tools.export_adapter import main as export
from tools.merge_lora import main as merge

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return save_parts(tmp_path / "parts")


def part_values(run: Run, part: str) -> dict[str, Tensor]:
    return values(run.model.get_submodule(part))


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
def test_one_file_per_part_that_was_trained(parts: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    run = trained(config_of(parts, "lora", "full"))
    assert export([str(save(run, tmp_path)), str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "vision.safetensors",
        "vision_projector.safetensors",
        "lora.safetensors",
        "lora.json",
        "README.md",
    }
    for part in ("vision", "vision_projector"):
        same(load_file(tmp_path / "out" / f"{part}.safetensors"), part_values(run, part))
    adapter = {name: p.detach() for name, p in trainable(run.model).items() if name.startswith("llm.")}
    same(load_file(tmp_path / "out" / "lora.safetensors"), adapter)


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
def test_the_language_models_own_weights_are_left_where_they_are(parts: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    run = trained(config_of(parts, "full"))
    assert export([str(save(run, tmp_path)), str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"vision_projector.safetensors", "README.md"}
    same(load_file(tmp_path / "out" / "vision_projector.safetensors"), part_values(run, "vision_projector"))


def test_of_a_sharded_checkpoint_nothing_else_is_read(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a tensor's bytes is recorded, and the bytes of all others are destroyed beforehand."""
    run = trained(config_of(parts, "full", "frozen"))
    folder = save_checkpoint(run, tmp_path, num_ranks=2)
    for file in folder.glob("rank-*.safetensors"):
        destroy(file, lambda name: not name.startswith("weights/vision_projector."))
    read: set[str] = set()

    class Recorder:
        def __init__(self, path: Path, framework: str) -> None:
            self.file, self.inside = safe_open(path, framework=framework), Path(path).parent == folder

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, name: str) -> Tensor:
            read.add(name)
            return self.file.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            part = self.file.get_slice(name)
            recorder = self

            class Slice:
                def get_shape(self) -> list[int]:
                    return part.get_shape()

                def get_dtype(self) -> str:
                    return part.get_dtype()

                def __getitem__(self, index: Any) -> Tensor:
                    if recorder.inside:
                        read.add(name)
                    return part[index]

            return Slice()

    safe_open = tensor_files.safe_open
    monkeypatch.setattr(tensor_files, "safe_open", Recorder)
    digested: list[str] = []
    digest = tensor_files.file_digest
    monkeypatch.setattr("model.files.manifest.file_digest", lambda path: digested.append(path.name) or digest(path))
    assert export([str(folder), str(tmp_path / "out")]) == 0
    assert read == {f"weights/vision_projector.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert digested == []
    monkeypatch.undo()
    same(load_file(tmp_path / "out" / "vision_projector.safetensors"), part_values(run, "vision_projector"))


def destroy(file: Path, chosen: Callable[[str], bool]) -> None:
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for name, facts in json.loads(data[8:end]).items():
        if name != "__metadata__" and chosen(name):
            begin, stop = facts["data_offsets"]
            data[end + begin : end + stop] = b"\xff" * (stop - begin)
    file.write_bytes(data)


def test_a_checkpoint_with_a_frozen_projector_gives_the_one_it_was_started_with(tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "llama", "llama")  # whose LoRA folders LLaVA loads
    first = trained(config_of(parts, "frozen"), seed=1)
    start = str(save_final(first, tmp_path))
    run = trained(config_of(parts, "lora", projector="frozen", init_from=start), seed=2)
    for target in ("safetensors", "llava"):
        assert export([str(save_checkpoint(run, tmp_path / target)), str(tmp_path / target / "out"), "--for", target]) == 0
    found = load_file(tmp_path / "safetensors" / "out" / "vision_projector.safetensors")
    same(found, part_values(first, "vision_projector"))
    bins = torch.load(tmp_path / "llava" / "out" / "mm_projector.bin", weights_only=True)
    same({name.removeprefix("model.mm_projector."): t for name, t in bins.items()}, found)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_llavas_projector_has_llavas_keys_and_comes_back(parts: Path, tmp_path: Path, kind: str) -> None:
    run = trained(config_of(parts, "frozen", kind=kind))
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "out"), "--for", "llava"]) == 0
    file = tmp_path / "out" / "mm_projector.bin"
    stored = torch.load(file, weights_only=True)
    layers = [""] if kind == "linear" else [f"{2 * i}." for i in range(int(kind[3]))]
    assert set(stored) == {f"model.mm_projector.{layer}{name}" for layer in layers for name in ("weight", "bias")}
    started = build(config_of(parts, kind=kind, path=str(file)), seed=9)
    same(part_values(started, "vision_projector"), part_values(run, "vision_projector"))
    for prefix in ("", "base_model.model.model.", "module.model."):  # non_lora_trainables.bin and others' wrappers
        torch.save({prefix + name.removeprefix("model."): t for name, t in stored.items()}, file)
        again = build(config_of(parts, kind=kind, path=str(file)), seed=9)
        same(part_values(again, "vision_projector"), part_values(run, "vision_projector"))


def test_what_a_target_cannot_hold_is_refused_with_the_reason(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    square = save_parts(tmp_path / "square", hidden_size=24, num_attention_heads=4)
    finals = {
        "linear": save_final(trained(config_of(parts, kind="linear")), tmp_path / "linear"),
        "identity": save_final(trained(config_of(square, "full", kind="identity")), tmp_path / "identity"),
        "tower": save_final(trained(config_of(parts, "lora", "lora")), tmp_path / "tower"),
        "full": save_final(trained(config_of(parts, "full")), tmp_path / "full"),
    }
    for name, target, reason in [
        ("linear", "hf", "model.vision_projector.kind = 'linear'"),
        ("identity", "hf", "kind = 'identity'"),
        ("identity", "llava", "kind = 'identity' has no mm_projector.bin in LLaVA"),
        ("identity", "safetensors", "trained nothing beside the language model's own weights"),
        ("tower", "peft", "no place for its adapters"),
        ("full", "peft", "model.llm.tune = 'full': the run has no LoRA adapter"),
    ]:
        assert export([str(finals[name]), str(tmp_path / "out"), "--for", target]) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert export([str(parts), str(tmp_path / "out")]) == 2
    assert "is no final/ or checkpoint folder of ours" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_never_written_to(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_final(trained(config_of(parts)), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert export([str(folder), str(out)]) == 0  # empty is fine
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for tool in (export, merge):
        assert tool([str(folder), str(out)]) == 2
        assert "exists and is not an empty folder" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "file").write_text("x")
    assert export([str(folder), str(tmp_path / "file" / "out")]) == 73
    assert "cannot be written" in capsys.readouterr().err


def test_it_runs_as_a_file_and_says_what_to_type_next(parts: Path, tmp_path: Path) -> None:
    folder = save_final(trained(config_of(parts)), tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "export_adapter.py"), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+\.\d KB  vision_projector\.safetensors", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("next: python -m trainer.main --cfg run.toml model.vision_projector.path=")


def test_build_model_reads_an_exported_part(parts: Path, tmp_path: Path) -> None:
    run = trained(config_of(parts, "lora"))
    export([str(save_final(run, tmp_path)), str(tmp_path / "out")])
    config = config_of(parts, "lora", path=str(tmp_path / "out"))
    vocabulary = run.card.vocabulary
    same(values(build_model(config, replace(NO_LORA, path=str(tmp_path / "out")), vocabulary)), values(run.model))
