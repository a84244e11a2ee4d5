"""The look at the data runs beside the building of the model: nobody waits for it, and what it finds is told as before."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError, DataError
from tests.support.ranks import run_ranks
from tests.support.runs import config_of
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.records import look_beside
from trainer.records.look_beside import LookBeside
from trainer.records.quick_check import ENOUGH, look
from trainer.records.run_data import RunData, open_data

ALONE = World(0, 0, 1, None)  # type: ignore[arg-type]
BAD = DataError("a.json:1: text: is empty")


Answer = list[str] | DataError


def begun(world: World, monkeypatch: pytest.MonkeyPatch, answer: Answer, until: threading.Event | None = None) -> LookBeside:
    def looking(data: Any, config: Any, note: Any, is_awaited: Any) -> list[str]:
        note("a.json:1")
        if until is not None:
            until.wait(20)
        if isinstance(answer, DataError):
            raise answer
        return answer

    monkeypatch.setattr(look_beside, "look", looking)
    return LookBeside(None, None, world)  # type: ignore[arg-type]


def test_it_runs_while_the_model_is_built_and_tells_its_lines_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    until = threading.Event()
    beside = begun(ALONE, monkeypatch, ["train a: looked at 1 of 1 records: 0 bad"], until)
    beside.stop_early()  # the model is being built: nothing waits
    until.set()
    assert beside.finish(lambda at: None) == ["train a: looked at 1 of 1 records: 0 bad"]


def test_a_look_that_is_stuck_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    until, told = threading.Event(), list[str]()
    beside = begun(ALONE, monkeypatch, [], until)
    threading.Timer(0.6, until.set).start()
    assert beside.finish(told.append) == [] and told == ["a.json:1"]


def test_a_long_load_does_not_go_on_for_long_once_the_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_beside, "PATIENCE", 0.1)
    beside = begun(ALONE, monkeypatch, BAD)
    end = time.monotonic() + 20
    with pytest.raises(DataError, match=r"a\.json:1"):
        while time.monotonic() < end:
            beside.stop_early()
            time.sleep(0.01)


def opened(parts: Path, tmp_path: Path) -> tuple[RunData, RunConfig]:
    config = config_of(parts, output_dir=str(tmp_path / "run"))
    return open_data(config, ALONE), config


def test_what_fails_in_the_thread_is_raised_where_the_run_waits(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> list[str]:
        raise MemoryError("planted")

    monkeypatch.setattr(look_beside, "look", broken)
    with LookBeside(*opened(parts, tmp_path), ALONE) as beside, pytest.raises(MemoryError, match="planted"):
        beside.finish(lambda at: None)


def test_once_it_is_awaited_enough_is_enough(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.records.quick_check.ENOUGH", 5)
    data, config = opened(parts, tmp_path)
    (line,) = look(data, config, is_awaited=lambda: True)
    assert line.startswith("train train: looked at 5 of 22 records") and ENOUGH < 2000
    (line,) = look(data, config)
    assert line.startswith("train train: looked at 22 of 22 records")


def both_wrong(world: World, alone: int) -> str:
    """The data are refused, late, and the model cannot be built on any rank, or on rank `alone` only."""
    monkeypatch = pytest.MonkeyPatch()
    until = threading.Event()
    beside = begun(world, monkeypatch, BAD, until)
    if world.is_main:
        threading.Timer(0.5, until.set).start()
    try:
        if alone in (-1, world.rank):
            beside.precede()
            raise ConfigError("no weights")
        return "built"
    except (ConfigError, DataError) as error:
        return str(error)
    finally:
        if world.is_main:  # its process holds the thread that answers
            beside._thread.join()
        time.sleep(0.2)


@pytest.mark.parametrize("alone", [-1, 1])
def test_of_two_things_that_are_wrong_every_rank_tells_that_of_the_data(alone: int) -> None:
    told = run_ranks(both_wrong, 2, alone)
    assert told[1] == str(BAD) and told[0] == (told[1] if alone == -1 else "built")
