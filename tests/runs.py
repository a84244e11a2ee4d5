"""A tiny run from real files: parts with a tokenizer, pictures on disk, records of every kind, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.tokenizer import save_tokenizer
from tests.tiny import VOCAB, save_llm, save_tower
from tests.tiny_tokenizers import NAMES
from trainer.config import RunConfig, parse_config

NUM_RECORDS = 22


def save_parts(folder: Path, family: str = "qwen2_tied", tower: str = "clip", tokenizer: str = "qwen", **overrides: Any) -> None:
    """folder/llm with a tokenizer and folder/vision."""
    made = NAMES[tokenizer]()
    save_llm(folder / "llm", family, **{"vocab_size": max(VOCAB, len(made)), **overrides})
    save_tokenizer(made, folder / "llm")
    save_tower(folder / "vision", tower)


def save_records(folder: Path, num_records: int = NUM_RECORDS) -> None:
    """folder/train.json and folder/images: text only, one picture, two pictures, in turn."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(num_records):
        names = [f"{i}_{k}.png" for k in range(i % 3)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "images" / name)
        question = "<image>\n" * len(names) + "What is this? " + "red " * (i % 5)
        record: dict[str, Any] = {
            "id": f"r{i}",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"{i} cats on a mat"}],
        }
        if names:
            record["image"] = names if len(names) > 1 else names[0]
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records, indent=1))


def tables(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """run.toml of the tiny run as tables; `sections` are merged in."""
    base: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {
            "llm": {"path": str(folder / "llm"), "tune": "full"},
            "vision": {"path": str(folder / "vision"), "tune": "full"},
            "vision_projector": {},
        },
        "data": {"sources": [{"path": str(folder / "train.json"), "media_root": str(folder / "images")}], "workers": 0},
        "batch": {"global_batch_size": 6, "micro_batch_size": 2},
        "optim": {"lr": 1e-2},
        "train": {"max_steps": 6},
        "checkpoint": {"every": 2, "keep": 2},
        "log": {"every": 2},
        "parallel": {"strategy": "ddp"},
    }
    return merged(base, sections)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Tables merge, everything else is replaced; None removes."""
    found = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = merged(found[key], value)
        elif value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found


def config_of(folder: Path, **sections: Any) -> RunConfig:
    return parse_config(tables(folder, **sections), "test")
