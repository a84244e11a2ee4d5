"""Norms of parts are those of one process however weights are shared; start.json tells what a start found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.loop import lines_of
from tests.support.ranks import run_ranks
from tests.support.runs import start, start_alone

PARTS = ("vision", "vision_projector", "llm")


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, {"strategy": "fsdp"}),
        pytest.param(2, {"strategy": "ddp"}, marks=pytest.mark.long),
        pytest.param(4, {"strategy": "hsdp", "shard_size": 2}, marks=pytest.mark.long),
    ],
    ids=lambda value: value["strategy"] if isinstance(value, dict) else str(value),
)
def test_norms_of_parts_are_those_of_one_process(parts: Path, tmp_path: Path, size: int, parallel: dict[str, Any]) -> None:
    sections = {"train": {"max_steps": 2}, "optim": {"lr": 1e-4}}
    assert start_alone(parts, tmp_path / "one", sections).code == 0
    assert {s.code for s in run_ranks(start, size, parts, tmp_path / "some", {**sections, "parallel": parallel})} == {0}
    for one, some in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "some")):
        own = [one[f"train/grad_norm/{part}"] for part in PARTS]
        assert math.sqrt(sum(x * x for x in own)) == pytest.approx(one["train/grad_norm"], rel=1e-5) and min(own) > 0
        assert [some[f"train/grad_norm/{part}"] for part in PARTS] == pytest.approx(own, rel=1e-4)
    note = json.loads((tmp_path / "some" / "start.json").read_text())
    assert (note["step"], note["last_step"], note["count"], note["stage"]) == (0, 2, 1, "")
    assert [row["part"] for row in note["parts"]] == list(PARTS) and all(row["num_trainable"] > 0 for row in note["parts"])
    assert note["machine"]["device"].startswith(f"{size} process(es) on ") and "llm" in note["plan"]
