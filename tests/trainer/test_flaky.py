"""Law 8 for records that can be read at times only: once quarantined, out from the next epoch on, whether resumed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.dataset import MultimodalDataset
from data.records.record import RecordError
from tests.support.ranks import run_ranks
from tests.support.resume import cut, metrics, weights
from tests.support.runs import Start, start
from trainer import loop
from trainer.distributed.world import World
from trainer.records.quarantine import Quarantine

FLAKY, EPOCH = 4, 4  # the record, and the steps of an epoch


def start_on_a_flaky_disk(world: World, parts: Path, output_dir: Path, sections: dict[str, Any], steps: int) -> Start:
    """A start whose first `steps` steps cannot read one record."""
    read, step = MultimodalDataset._sample, loop.train_step
    done: list[int] = []

    def reading(self: MultimodalDataset, i: int) -> Any:
        if i == FLAKY and len(done) < steps:
            raise RecordError("train.json:5", "r4", "image", "Input/output error")
        return read(self, i)

    def stepping(*args: Any, **kwargs: Any) -> Any:
        done.append(args[4].step)
        return step(*args, **kwargs)

    MultimodalDataset._sample, loop.train_step = reading, stepping  # type: ignore[method-assign]
    return start(world, parts, output_dir, sections)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 3])
def test_what_could_not_be_read_once_stays_out_whether_the_run_is_resumed_or_not(parts: Path, tmp_path: Path, size: int) -> None:
    """Two epochs: the second could read it. Stopped in the first one after it was met, and in the second."""
    sections = {"train": {"max_steps": 2 * EPOCH}}
    whole = run_ranks(start_on_a_flaky_disk, size, parts, tmp_path / "whole", sections, EPOCH)
    assert {answer.code for answer in whole} == {0}
    assert FLAKY not in {i for answer in whole for step in answer.seen for i in step}
    for stop in (3, 6):
        again = cut(tmp_path / "whole", tmp_path / f"again{stop}", stop)
        answers = run_ranks(start_on_a_flaky_disk, size, parts, again, sections, max(0, EPOCH - stop))
        assert {answer.code for answer in answers} == {0}
        assert [answer.seen for answer in answers] == [answer.seen[stop:] for answer in whole]
        assert weights(again) == weights(tmp_path / "whole") and metrics(again) == metrics(tmp_path / "whole")


def test_what_is_out_depends_on_the_epoch_alone(tmp_path: Path) -> None:
    """Epochs of 10 steps. Of this epoch, what was met before stays in, for it does so in a run that is not stopped; what an
    earlier start met later on is out.
    """
    found = Quarantine(tmp_path, {"train": 99, "validation": 9}, 1.0)
    row = {"source": "s", "too_long": False, "reason": "gone"}
    met = {3: 9, 4: 10, 5: 14, 6: 15, 7: 31}
    found._count([{**row, "split": "train", "sample_id": i, "step": step} for i, step in met.items()])
    found._count([{**row, "split": "validation", "sample_id": 8, "step": 1}])
    assert found.excluded_at(15, 10) == {3, 6, 7}
    assert found.excluded_at(10, 10) == {3, 4, 5, 6, 7} == found.excluded_at(20, 10)
