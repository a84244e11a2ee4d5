"""Nothing hangs: whatever happens to one rank or its workers, all ranks leave soon, and say who, where and on which sample."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import MultimodalDataset
from data.text.template import Template
from tests.support import hangs
from tests.support.hangs import check
from tests.support.ranks import ends_of, run_ranks
from tests.support.runs import config_of
from trainer.distributed import world as distributed
from trainer.distributed.rank_consistency import differences
from trainer.distributed.world import World
from trainer.faults import hang_diagnosis as judge_module
from trainer.faults import phase_tracker as watch_module
from trainer.faults.hang_diagnosis import LEAST_AT_START, HangDetector, describe_position
from trainer.faults.phase_tracker import STARTING, WAITING, PhaseTracker
from trainer.faults.watchdog import is_of_peers
from trainer.machine.processes import GONE, HALTED, RUNNING, Process, current_process
from trainer.main import run

CASES = [
    ("ddp", 1, "stopped", "backward", 2),
    ("ddp", 0, "killed", "forward", 1),
    ("fsdp", 1, "raising", "update", 1),
    ("fsdp", 0, "sleeping", "forward", 2),
    ("ddp", 1, "worker sleeping", "data", 4),
    ("ddp", 1, "worker killed", "data", 4),
]


@pytest.mark.parametrize(("strategy", "culprit", "how", "phase", "step"), CASES)
def test_all_ranks_leave_and_the_culprit_is_named(
    parts: Path, tmp_path: Path, strategy: str, culprit: int, how: str, phase: str, step: int
) -> None:
    check(parts, tmp_path / "run", strategy, 2, culprit, how, phase, step)


def beat(number: int, phase: str = "forward", place: tuple[int, int] = (3, 2), **more: Any) -> dict[str, Any]:
    return {"number": number, "phase": phase, "step": place[0], "position": list(place), "moves": 7, "waiting": False, **more}


def judged(beats: dict[int, list[dict[str, Any]]], seconds: float = 10.0) -> tuple[tuple[int, ...], str] | None:
    """What comes of ranks whose beats are these at one second each, and whose last one is told again until `seconds`."""
    judge = HangDetector(beats, 5.0, 0.0)
    number = 0
    for second in range(int(seconds) + 1):
        for rank, told in beats.items():
            number += 1
            judge.observe(rank, {**told[min(second, len(told) - 1)], "number": number}, float(second))
        if found := judge.absent(float(second)) or judge.stuck(float(second)):
            return found.culprits, found.what
    return None


def test_the_one_behind_is_to_blame() -> None:
    waits = beat(0, "backward", (3, 3), waiting=True)
    assert judged({0: [waits], 1: [beat(0)], 2: [waits]}) == ((1,), "has made no progress for 5 s")
    # Behind by a step, though it began to wait last.
    moving = [beat(0, place=(2, k)) for k in range(4)]
    found = judged({0: [waits], 1: moving, 2: [waits]})
    assert found is not None and found[0] == (1,)


def test_of_those_at_one_place_the_one_that_waits_for_nobody_is_to_blame() -> None:
    waits = beat(0, waiting=True)
    assert judged({0: [waits], 1: [beat(0)], 2: [waits]}) == ((1,), "has made no progress for 5 s")
    found = judged({0: [waits], 1: [waits]})
    assert found is not None and found[0] == (0, 1) and "the network" in found[1]


def test_one_that_is_stopped_is_told_as_such_however_lately_its_thread_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would never leave by itself, as one that only does not come on does."""
    monkeypatch.setattr(judge_module, "process_state", lambda beat: HALTED if beat.get("pid") == 1 else RUNNING)
    waits = beat(0, "backward", (3, 3), waiting=True)
    assert judged({0: [waits], 1: [beat(0, pid=1)]}) == ((1,), "has been stopped (SIGSTOP, or a debugger) for 5 s")


def test_what_takes_long_by_its_nature_or_goes_on_is_left_alone() -> None:
    ends = beat(0, "final", (9, 1))
    assert judged({0: [ends], 1: [ends]}, 60.0) is None
    assert judged({0: [beat(0)], 1: [{**beat(0), "moves": k} for k in range(11)]}) is None  # slow, and alive
    assert judged({0: [beat(0, "done", (3, 9))], 1: [beat(0, "final", (3, 8))]}) is None


def test_phases_of_a_start_are_watched_with_more_patience() -> None:
    certifies = beat(0, "certify", (-1, 3), at="mix.json:17") | {"step": None}
    waits = certifies | {"waiting": True}
    assert judged({0: [certifies], 1: [waits]}, LEAST_AT_START - 1) is None
    assert judged({0: [certifies], 1: [waits]}, LEAST_AT_START) == ((0,), "has made no progress for 20 s")
    assert judged({0: [certifies]}, LEAST_AT_START) == ((0,), "has made no progress for 20 s")  # a process alone judges itself
    assert describe_position(certifies, []) == "in certify, before the first step, at mix.json:17"
    for phase in STARTING:
        found = judged({0: [waits | {"phase": phase}], 1: [certifies | {"phase": phase}]}, LEAST_AT_START)
        assert found is not None and found[0] == (1,), phase
    reads = [beat(0, "load", (-1, 5)) | {"bytes": k} for k in range(100)]
    assert judged({0: reads, 1: [beat(0, "load", (-1, 5), waiting=True)]}, 90.0) is None  # from a slow disk, say


def test_a_watch_tells_how_far_a_long_phase_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "traffic", lambda: 5)
    tracker = PhaseTracker()
    tracker.mark("load")
    place = tracker.now()["position"]
    tracker.report_progress("llm.head.weight")
    now = tracker.now()
    assert (now["at"], now["bytes"], now["position"]) == ("llm.head.weight", 5, place)  # other ranks tell other names
    tracker.mark("certify")
    assert (tracker.now()["at"], tracker.now()["bytes"]) == ("", 0)


def start_stuck(world: World, parts: Path, output_dir: Path, culprit: int, where: str) -> int:
    """A run whose rank `culprit` hangs in what `where` names."""
    judge_module.LEAST_AT_START = 2 * hangs.STALL_SECONDS  # phases before it may take as long on a busy machine
    os.setsid()
    holder, name = {"certify": (Template, "encode"), "check": (MultimodalDataset, "record")}[where]
    if world.rank == culprit:
        setattr(holder, name, lambda *args, **options: time.sleep(hangs.FOREVER))
    sections = {"faults": {"stall_seconds": hangs.STALL_SECONDS}, "output_dir": str(output_dir)}
    os._exit(run(config_of(parts, **sections), world))


@pytest.mark.parametrize(("size", "culprit", "where"), [(2, 1, "certify"), (1, 0, "check")])
def test_a_start_that_is_stuck_on_a_record_ends_and_names_it(
    parts: Path, tmp_path: Path, size: int, culprit: int, where: str
) -> None:
    ends = ends_of(start_stuck, size, parts, tmp_path / "run", culprit, where)
    told = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ends.codes == [1] * size and (told["code"], told["rank"]) == (1, culprit), told
    expected = (
        rf"rank {culprit} has made no progress for \d+ s in {where}, before the first step, at train.json:\d+; stacks of all ranks"
    )
    assert re.match(expected, told["reason"]), told
    assert "File" in (tmp_path / "run" / "stacks" / f"rank-{culprit:05d}.txt").read_text()


def test_a_rank_that_is_not_heard_of_is_to_blame_and_a_judge_that_was_stopped_itself_is_not_hasty() -> None:
    judge = HangDetector(range(2), 5.0, 0.0)
    for second in range(5):
        judge.observe(0, beat(second), float(second))
        judge.observe(1, beat(0), float(second))
    assert judge.absent(4.9) is None
    assert (found := judge.absent(5.0)) is not None and found.culprits == (1,) and "no sign of life for 5 s" in found.what
    judge.extend_deadlines(100.0)
    assert judge.absent(104.9) is None and judge.absent(105.0) is not None
    judge.broken = True  # a collective has broken: five seconds are enough, however long ranks may take otherwise
    patient = HangDetector(range(2), 600.0, 0.0)
    patient.observe(0, beat(1), 90.0)
    assert patient.absent(95.0) is None
    patient.broken = True
    assert (found := patient.absent(94.0)) is not None and found.culprits == (1,)


def test_processes_are_known_again() -> None:
    me = current_process()
    assert me.state() == RUNNING
    assert Process(me.host, me.machine, me.pid, str(int(me.started) + 1)).state() == GONE  # its number was given to another
    assert Process(me.host, "another machine", me.pid, me.started).state() is None


def test_a_watch_tells_the_samples_of_the_micro_batch() -> None:
    tracker = PhaseTracker()
    tracker.begin("copy", 6, [[4, 9], [2, -1]])
    assert tracker.now()["samples"] == [4, 9, 2]
    tracker.mark("forward")
    tracker.mark("backward")
    tracker.mark("forward")
    now = tracker.now()
    assert (now["phase"], now["step"], now["samples"], now["position"]) == ("forward", 6, [2], (6, 3))
    assert describe_position(now, ["r2 (a.json:3)"]) == "in forward of step 7, sample r2 (a.json:3)"
    tracker.begin("log", 7)
    assert describe_position(tracker.now(), []) == "in log after step 7" and tracker.now()["position"] == (7, 0)


def start_apart(world: World, parts: Path, output_dir: Path) -> int:
    return run(config_of(parts, output_dir=str(output_dir), seed=42 + world.rank, optim={"lr": 1e-2}), world)


def test_ranks_with_different_settings_are_told_which(parts: Path, tmp_path: Path) -> None:
    assert run_ranks(start_apart, 2, parts, tmp_path / "run") == [2, 2]
    reason = json.loads((tmp_path / "run" / "exit.json").read_text())["reason"]
    assert "seed is 42 on rank 0 and 43 on rank 1" in reason and "optim.lr" not in reason
    lines = differences({"a": 1, "b": 2}, {1: {"a": 1, "b": 3}, 2: {"a": 1, "b": 3, "c": 4}})
    assert lines == ["b is 2 on rank 0 and 3 on ranks 1, 2", "c is None on rank 0 and 4 on rank 2"]


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(distributed, "START_SECONDS", 0.2)
    with pytest.raises(distributed.ConfigError, match="ranks 1, 2 of 3 did not come within"):
        distributed.join_store()
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(distributed.ConfigError, match="'MASTER_ADDR' is not set"):
        distributed.join_store()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error"), True),
        (BrokenPipeError(32, "Broken pipe"), False),  # of whoever read what the run prints
        (FileNotFoundError(2, "No such file or directory", "igloo.png"), False),
        (RuntimeError("size mismatch for igloo"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_what_a_collective_says_is_told_from_a_fault_of_this_rank(error: Exception, expected: bool) -> None:
    assert is_of_peers(error) == expected


def test_who_waits_for_a_device_waits_for_the_others() -> None:
    """The numbers of the step before are asked for by an event, and that comes after its collectives."""
    file = torch.cuda.Event.synchronize.__code__.co_filename
    assert any(place in file for place in WAITING)
