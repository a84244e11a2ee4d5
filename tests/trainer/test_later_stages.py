"""A look at the data of later stages, made before the first one trains: it counts as progress, however long it takes."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.runs import config_of
from tests.support.stages import ALIGN, WHOLE
from trainer.distributed.world import World
from trainer.records.later_stages import check_later_stages
from trainer.runfile.stages import list_stages


def test_what_is_being_read_is_told_to_the_watchdog(parts: Path, tmp_path: Path) -> None:
    root = config_of(parts, output_dir=str(tmp_path / "run"), stage=[ALIGN, WHOLE])
    seen: list[str] = []
    world = World(0, 0, 1, torch.device("cpu"))
    lines = list(check_later_stages(root, list_stages(root)[1:], world, seen.append))
    assert lines and all(line.startswith("later     whole: ") for line in lines)
    assert any("train.json" in at for at in seen)
    assert len(seen) > len(lines) + 1  # records, not sources alone
