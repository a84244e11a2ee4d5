"""samples.bin holds what every step held, after a kill and a resume too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.order.mixing import make_pools
from data.order.sampler import Sampler
from model.errors import ConfigError
from tests.support.resume import LORA, cut
from tests.support.runs import failure_of, start_alone
from tests.support.trainable import ALONE
from trainer.distributed.world import World
from trainer.records.sample_log import SampleLog, read_step


def sampler() -> Sampler:
    pools = make_pools(["a", "b"], [30, 13], ["all", "all"], [0.5, 2.0], 0, False)  # 15 + 26 places: steps of 8 leave one
    return Sampler(np.arange(43), np.zeros(43, np.int8), 8, 0, "length", pools)


def check(folder: Path, num_steps: int) -> None:
    for step in range(num_steps):
        assert read_step(folder, step).tolist() == sampler().step(step).tolist()
    with pytest.raises(ConfigError, match=rf"step {num_steps} is not on record: .* holds steps 0 to {num_steps - 1}"):
        read_step(folder, num_steps)


def test_every_step_is_read_back_over_short_ones_and_epochs(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, sampler(), 0, ALONE)
    for step in range(15):
        log.mark_completed(step + 1)
        if step in (3, 4, 9):
            log.flush()
            check(tmp_path, step + 1)
    check(tmp_path, 10)  # the rest waits for its line of the log
    log.flush()
    check(tmp_path, 15)
    assert [len(read_step(tmp_path, step)) for step in (4, 5, 11)] == [8, 1, 1]
    assert (tmp_path / "samples.bin").stat().st_size == 15 * 8 * 4


@pytest.mark.parametrize("left", [0, 4 * 32, 7 * 32, 9 * 32 + 5, 12 * 32])
def test_a_resumed_log_is_cut_back_or_filled_up_to_its_step(tmp_path: Path, left: int) -> None:
    log = SampleLog(tmp_path, sampler(), 0, ALONE)
    log.mark_completed(12)
    log.flush()
    path = tmp_path / "samples.bin"
    path.write_bytes(path.read_bytes()[:left])
    again = SampleLog(tmp_path, sampler(), 7, ALONE)
    check(tmp_path, 7)
    again.mark_completed(9)
    again.flush()
    check(tmp_path, 9)
    SampleLog(tmp_path, sampler(), 0, ALONE)
    assert path.stat().st_size == 0


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, sampler(), 0, World(1, 1, 2, ALONE.device))
    log.mark_completed(3)
    log.flush()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no record of its steps"):
        read_step(tmp_path, 0)


def test_ids_may_take_eight_bytes(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('{"global_batch_size": 3, "dtype": "<i8"}')
    rows = np.array([[5, 2**31, 2**40], [7, -1, -1]], dtype="<i8")
    (tmp_path / "samples.bin").write_bytes(rows.tobytes())
    assert read_step(tmp_path, 0).tolist() == [5, 2**31, 2**40] and read_step(tmp_path, 1).tolist() == [7]


def test_what_a_run_trained_on_is_on_record_whole_and_resumed(parts: Path, tmp_path: Path) -> None:
    """The samples of every batch, and the one that was quarantined."""
    records = json.loads((parts / "train.json").read_text())
    records[5]["image"] = "gone.png"
    (tmp_path / "train.json").write_text(json.dumps(records))
    source = {"path": str(tmp_path / "train.json"), "media_root": str(parts / "images"), "weight": 0.7}
    sections: dict[str, Any] = {**LORA, "data": {"sources": [source]}}
    whole = start_alone(parts, tmp_path / "whole", sections)
    again = cut(tmp_path / "whole", tmp_path / "again", 3)
    resumed = start_alone(parts, again, sections)
    assert (whole.code, resumed.code) == (0, 0) and resumed.seen == whole.seen[3:]
    for run in (tmp_path / "whole", again):
        logged = [sorted(read_step(run, step).tolist()) for step in range(6)]
        assert [[i for i in ids if i != 5] for ids in logged] == [sorted(ids) for ids in whole.seen]
        assert any(5 in ids for ids in logged)


@pytest.mark.parametrize("damage", ["flipped", "of another run", "garbage"])
def test_a_log_that_the_plan_does_not_bear_out_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    log = SampleLog(tmp_path, sampler(), 0, ALONE)
    log.mark_completed(12)
    log.flush()
    path = tmp_path / "samples.bin"
    rows = np.fromfile(path, "<i4").reshape(12, 8)
    rows[3] = {"flipped": np.roll(rows[3], 1), "of another run": rows[4], "garbage": np.full(8, 2**31 - 1)}[damage]
    path.write_bytes(rows.tobytes())
    SampleLog(tmp_path, sampler(), 9, ALONE)
    check(tmp_path, 9)
    assert f"{path} holds other samples than the plan for step 3" in capsys.readouterr().out
    SampleLog(tmp_path, sampler(), 9, ALONE)
    assert not capsys.readouterr().out


def test_a_row_that_is_no_list_of_samples_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('{"global_batch_size": 3, "dtype": "<i4"}')
    (tmp_path / "samples.bin").write_bytes(np.array([1, -7, 2], "<i4").tobytes())
    with pytest.raises(ConfigError, match="damaged at step 0"):
        read_step(tmp_path, 0)


def test_what_is_lost_of_a_run_is_told_when_it_goes_on(parts: Path, tmp_path: Path) -> None:
    records = json.loads((parts / "train.json").read_text())
    for i in range(1, 22, 3):
        records[i]["image"] = "gone.png"
    (tmp_path / "train.json").write_text(json.dumps(records))
    sources = [{"path": str(tmp_path / "train.json"), "media_root": str(parts / "images")}]
    run = tmp_path / "run"
    assert start_alone(parts, run, {"data": {"sources": sources}, "train": {"max_steps": 2}}).code == 0
    rows = (run / "quarantine.jsonl").read_text().splitlines(keepends=True)
    assert rows
    (run / "metrics.jsonl").unlink()
    (run / "quarantine.jsonl").unlink()
    found = start_alone(parts, run, {"data": {"sources": sources}, "train": {"max_steps": 3}})
    assert found.code == 0 and "metrics.jsonl is not there: the curve begins anew after step 2" in found.said
    assert f"quarantine.jsonl holds 0 of the {len(rows)} records" in found.said
    (run / "quarantine.jsonl").write_text(rows[0].replace('"source": "train"', '"source": "other"'))
    code, reason = failure_of(parts, run, {"data": {"sources": sources}, "train": {"max_steps": 4}})
    assert code == 65 and "quarantine.jsonl is of another run" in reason
