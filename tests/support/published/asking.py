"""Runs that start from a published model, and a record that asks about a picture of odd shape or a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.support.tiny_audio import wave
from tests.support.tiny_media import wav
from tools.exports.proofs import sample_picture
from trainer.config import RunConfig
from trainer.runfile.load import parse_config


def run_from(folder: Path, output: Path, **sections: Any) -> RunConfig:
    tables = {"output_dir": str(output), "model": {"init_from": str(folder), "dtype": "float32"}, "train": {"max_steps": 0}}
    return parse_config({**tables, **sections}, "test")


def question(folder: Path, specs: dict[str, Any]) -> dict[str, Any]:
    """A record with a picture of odd shape or a clip, after a first round without any."""
    parts: list[dict[str, Any]] = []
    if "image" in specs:
        sample_picture().save(folder / "odd.png")
        parts.append({"type": "image", "path": str(folder / "odd.png")})
    if "audio" in specs:
        (folder / "clip.wav").write_bytes(wav(clip()[:, None].numpy(), 16_000))
        parts.append({"type": "audio", "path": str(folder / "clip.wav")})
    said = [("user", "Hello."), ("assistant", "Yes?"), ("user", None), ("assistant", "A cat.")]
    text = [{"type": "text", "text": "What is this?"}]
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": words}] if words else [*parts, *text]} for role, words in said
        ]
    }


def clip() -> Tensor:
    return (wave(1.3) * 2**15).round().clamp(-(2**15), 2**15 - 1) / 2**15
