"""The authors' own layouts, there and back: what was trained for two steps opens again, and untrained tensors stay bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data import load_processor
from model import load_model
from tests.support.published.opening import ORIGINALS, opened, pictures
from tests.support.published.original import Original, lora
from tests.support.tiny_data import talk
from tools.export_adapter import main as export
from trainer.main import run
from trainer.runfile.load import parse_config

WHOLE = {"llm": "full", "vision": "full", "vision_projector": "full"}
CASES: dict[str, tuple[Callable[[Path], Original], str, dict[str, str]]] = {
    "tuned tower": (ORIGINALS["llava, tuned tower, safetensors"], "llava", WHOLE),
    "frozen tower that was tuned": (ORIGINALS["llava, tuned tower, safetensors"], "llava", {"llm": "full"}),
    "named tower": (ORIGINALS["llava"], "llava", {"llm": "full"}),
    "llava-next": (ORIGINALS["llava-next"], "llava", {"llm": "full"}),
    "lora": (lora, "llava", {"llm": "lora"}),
    "internvl": (ORIGINALS["internvl, tiles"], "internvl", WHOLE),
    "internvl, one view": (ORIGINALS["internvl, one view, Qwen3"], "internvl", WHOLE),
}
NAMED, TOWER = ("named tower",), "model.vision_tower."
"""Model that LLaVA opens with the tower of another folder: nobody reads the one in its own files."""
LONG = ("llava-next", "internvl, one view", "tuned tower")


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif (
            file.suffix == ".bin" and file.name != "mm_projector.bin"
        ):  # the projector once more, for LLaVA's --pretrain_mm_mlp_adapter
            found |= torch.load(file, weights_only=True)
    return found


def run_of(source: Path, root: Path, name: str, tune: dict[str, str], steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(root / name),
        "model": {"init_from": str(source), "dtype": "float32", **{part: {"tune": how} for part, how in tune.items()}},
        "data": {"workers": 0, "sources": [{"path": str(root / "data.json"), "media_root": str(root)}]},
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "optim": {"lr": 1e-2, "projector_lr": 1e-2},
        "train": {"max_steps": steps},
    }


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in CASES])
def test_there_and_back(tmp_path: Path, case: str) -> None:
    make, target, tune = CASES[case]
    original = make(tmp_path)
    pictures(tmp_path)
    records = [talk("<image>\nWhat is this?", f"A cat {i}.", images=[f"{i}.png"]) for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for folder, steps in (("same", 0), ("trained", 2)):
        out = tmp_path / f"{folder}-out"
        assert run(parse_config(run_of(original.folder, tmp_path, folder, tune, steps), "test")) == 0
        assert export([str(tmp_path / folder / "final"), str(out), "--for", target]) == 0
        before, after = stored(original.folder), stored(out)
        assert {*before} - {*after} == {
            key for key in before if case in NAMED and key.startswith(TOWER)
        } and after.keys() <= before.keys()
        changed = [key for key in after if not torch.equal(before[key], after[key])]
        assert (len(changed) > 10) == bool(steps), changed
    model, processor = opened(parse_config(run_of(out, tmp_path, "again", tune, 0), "test"))
    final = load_model(tmp_path / "trained/final")
    batch = load_processor(tmp_path / "trained/final")(records, answers=True, media_root=str(tmp_path))
    again = processor(records, answers=True, media_root=str(tmp_path))
    assert torch.equal(batch.input_ids, again.input_ids) and torch.equal(batch.media["image"].values, again.media["image"].values)
    with torch.no_grad():
        logits = [net.llm(inputs_embeds=net.embed(batch), position_ids=batch.position_ids).logits for net in (model, final)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
