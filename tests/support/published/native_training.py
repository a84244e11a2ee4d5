"""Tiny runs of the families that read pictures at their own size: records with pictures of mixed sizes, and how they train."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.support.published.families import FAMILIES
from tests.support.runs import merged, start
from trainer.distributed.world import World

PICTURES = ((0, 1, 2, 0, 1), (2, 0, 1, 2, 0), (0, 0))
"""Pictures of each record, step by step: in the last step no rank has one."""
SIZES = ((31, 20), (9, 60), (44, 44), (16, 8), (50, 23))
"""Pixels across and down of pictures, in turn."""
TUNES: dict[str, dict[str, Any]] = {
    "full": {"llm": {"tune": "full"}, "vision": {"tune": "full"}, "vision_projector": {"tune": "full"}},
    "projector": {"llm": {"tune": "frozen"}, "vision": {"tune": "frozen"}, "vision_projector": {"tune": "full"}},
    "tower": {"llm": {"tune": "frozen"}, "vision": {"tune": "full"}, "vision_projector": {"tune": "frozen"}},
    "lora": {"llm": {"tune": "lora"}, "vision": {"tune": "lora"}, "vision_projector": {"tune": "full"}},
}


def save_published(folder: Path, name: str) -> Path:
    """folder/published, how a run starts there, and records: pictures of mixed sizes, none, one or two to a record."""
    maker = FAMILIES[name]
    maker.write(folder / "published", True)
    (folder / "start.json").write_text(json.dumps(maker.sections(folder / "published")))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = []
    for i, count in enumerate(count for step in PICTURES for count in step):
        names = [f"{i}_{k}.png" for k in range(count)]
        for k, file in enumerate(names):
            wide, high = SIZES[(i + k) % len(SIZES)]
            Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)).save(folder / "images" / file)
        question = "<image>\n" * count + "What is this? " + "red " * (i % 5)
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{i} cats on a mat"}]
        records.append({"id": f"r{i}", "conversations": talk, **({"image": names} if names else {})})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def native_sections(folder: Path, tune: str = "full", **changes: Any) -> dict[str, Any]:
    """What a run from folder/published has beside `tests.support.runs.tables`; `changes` are merged in."""
    start = json.loads((folder / "start.json").read_text())
    parts = merged({"llm": {"path": None}, "vision": {"path": None}}, TUNES[tune])
    sections: dict[str, Any] = {
        "model": {"dtype": "float32", **parts},
        "data": {"order": "sequential", "max_length": 512},
        "batch": {"global_batch_size": len(PICTURES[0]), "micro_batch_size": len(PICTURES[0])},
        # A large eps keeps Adam from turning rounding into signs, a modest rate from amplifying it step by step.
        "optim": {"lr": 0.1, "eps": 1.0, "schedule": "constant"},
        "train": {"max_steps": 5},
        "checkpoint": {"every": 100, "keep": 1},
        **({"lora": {"rank": 2, "dropout": 0.0}} if tune == "lora" else {}),
    }
    found = merged(merged(sections, start), changes)
    found["batch"].setdefault("micro_batch_size")  # None takes out what the other tables say
    return found


def trained_natively(world: World, folder: Path, output: Path, cases: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Loss and gradient norm of every step of each case, by its name; the runs' folders stand in `output`."""
    warnings.filterwarnings("error", message="FSDP2-wrapped module")  # a unit returned a view; this process ends here
    found = {}
    for name, case in cases.items():
        assert start(world, folder, output / name, native_sections(folder, **case)).code == 0
        world.barrier()
        lines = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [line[key] for line in lines for key in ("train/loss", "train/grad_norm")]
    return found


def final_tensors(output: Path) -> dict[str, Tensor]:
    """Every tensor of output/final by file and name."""
    files = sorted((output / "final").glob("*.safetensors"))
    return {f"{file.name}: {name}": rows for file in files for name, rows in load_file(file).items()}


def largest_difference(found: Path, expected: Path) -> float:
    """Of the tensors of two runs' final/, relative to each tensor's largest number or 0.01."""
    ours, theirs = final_tensors(found), final_tensors(expected)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - rows).abs().max() / rows.abs().max().clamp(min=0.01)) for name, rows in theirs.items())
