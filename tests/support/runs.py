"""A tiny run from real files: parts with a tokenizer, pictures on disk, records of every kind, and its configuration."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.text.tokenizer import save_tokenizer
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCAB, save_llm, save_tower
from tests.support.tiny_tokenizers import NAMES
from trainer import loop
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.main import run
from trainer.runfile.load import parse_config

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


class Start(NamedTuple):
    code: int
    seen: list[list[int]]  # this rank's sample ids of every step it ran
    said: str


def start(world: World, folder: Path, output_dir: Path, sections: dict[str, Any]) -> Start:
    """One start of a run on one rank."""
    seen: list[list[int]] = []
    original = loop.train_step

    def recording(wrapped: Any, optimizer: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([i for batch in batches for i in batch.sample_ids.tolist() if i >= 0])
        return original(wrapped, optimizer, batches, *args, **kwargs)

    loop.train_step = recording
    try:
        config = config_of(
            folder, **{"output_dir": str(output_dir), "checkpoint": {"every": 1, "keep": 99}, "log": {"every": 1}, **sections}
        )
        with redirect_stdout(io.StringIO()) as said:
            return Start(run(config, world), seen, said.getvalue())
    finally:
        loop.train_step = original


def start_alone(parts: Path, output_dir: Path, sections: dict[str, Any]) -> Start:
    """The same in one process."""
    return run_ranks(start, 1, parts, output_dir, sections)[0]


def failure_of(parts: Path, output_dir: Path, sections: dict[str, Any]) -> tuple[int, str]:
    """A start that fails: its exit code and its reason, as exit.json tells them."""
    code = start_alone(parts, output_dir, sections).code
    written = json.loads((output_dir / "exit.json").read_text())
    assert written["code"] == code != 0
    return code, written["reason"]
