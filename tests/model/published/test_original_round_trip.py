"""The authors' own layouts, there and back: what was trained for two steps opens again, and untrained tensors stay bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data import load_processor
from model import load_model
from tests.support.published.opening import ORIGINALS, opened, pictures
from tests.support.tiny_data import talk
from tools.export_adapter import main as export
from trainer.main import run
from trainer.runfile.load import parse_config

CASES = {
    "llava, tuned tower, safetensors": "llava",
    "internvl, tiles": "internvl",
}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name."""
    return {name: rows for file in sorted(folder.glob("*.safetensors")) for name, rows in load_file(file).items()}


def run_of(source: Path, root: Path, name: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(root / name),
        "model": {
            "init_from": str(source),
            "dtype": "float32",
            "llm": {"tune": "full"},
            "vision": {"tune": "full"},
            "vision_projector": {"tune": "full"},
        },
        "data": {"workers": 0, "sources": [{"path": str(root / "data.json"), "media_root": str(root)}]},
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "optim": {"lr": 1e-2, "projector_lr": 1e-2},
        "train": {"max_steps": steps},
    }


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    original = ORIGINALS[name](tmp_path)
    pictures(tmp_path)
    records = [talk("<image>\nWhat is this?", f"A cat {i}.", images=[f"{i}.png"]) for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for folder, steps in (("same", 0), ("trained", 2)):
        out = tmp_path / f"{folder}-out"
        assert run(parse_config(run_of(original.folder, tmp_path, folder, steps), "test")) == 0
        assert export([str(tmp_path / folder / "final"), str(out), "--for", CASES[name]]) == 0
        before, after = stored(original.folder), stored(out)
        assert before.keys() == after.keys()
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert (len(changed) > len(before) // 2) == bool(steps), changed
    model, processor = opened(parse_config(run_of(out, tmp_path, "again", 0), "test"))
    final = load_model(tmp_path / "trained/final")
    batch = load_processor(tmp_path / "trained/final")(records, answers=True, media_root=str(tmp_path))
    again = processor(records, answers=True, media_root=str(tmp_path))
    assert torch.equal(batch.input_ids, again.input_ids) and torch.equal(batch.media["image"].values, again.media["image"].values)
    with torch.no_grad():
        logits = [net.llm(inputs_embeds=net.embed(batch), position_ids=batch.position_ids).logits for net in (model, final)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
