"""Law 8 at length: every step to stop at, every strategy, LoRA with dropout and full tuning, data workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.resume import LORA, cut, weights
from tests.support.runs import start

FULL: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 99}, "log": {"every": 1}}


@pytest.mark.long
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_stopped_after_every_step_it_ends_with_the_same_bytes(
    parts: Path, tmp_path: Path, size: int, strategy: str, tune: str
) -> None:
    chosen = {**FULL, **(LORA if tune == "lora" else {}), "parallel": {"strategy": strategy}, "data": {"workers": 2}}
    assert {s.code for s in run_ranks(start, size, parts, tmp_path / "whole", chosen, seconds=300)} == {0}
    expected = weights(tmp_path / "whole")
    for step in range(1, 6):
        again = cut(tmp_path / "whole", tmp_path / f"stopped{step}", step)
        assert {s.code for s in run_ranks(start, size, parts, again, chosen, seconds=300)} == {0}
        assert weights(again) == expected
