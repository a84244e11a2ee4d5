"""Whoever asks a run to stop, and however: it finishes the step, saves, leaves with 75 and goes on from there to the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig

from data.workers import prepare_worker
from tests.support import ranks
from tests.support.ranks import SERVER, run_ranks
from tests.support.resume import LORA, metrics, weights
from tests.support.runs import Start, merged, start, start_alone
from tests.support.stages import finals
from trainer import errors, loop, run
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.distributed.world import World
from trainer.faults import exit_report, signals
from trainer.faults.exit_report import RunEnd
from trainer.faults.requests import EVALUATE, SAVE, STOP, Requests

NEVER = {"checkpoint": {"every": 99, "keep": 99}, "log": {"every": 99}}
RARELY: dict[str, Any] = {**LORA, **NEVER, "train": {"max_steps": 8}}
Ask = tuple[int, int, str]
"""Rank, 0-based step, and a signal or the name of a file in the run folder."""


def ask(folder: Path, what: str) -> None:
    """Send a signal to this process, or make a file; returns when the thread has heard of it."""
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
        time.sleep(0.2)
        return
    (folder / what).touch()
    while (folder / what).exists():
        time.sleep(0.01)


def start_asked(world: World, parts: Path, folder: Path, sections: dict[str, Any], asks: tuple[Ask, ...]) -> Start:
    """One start in whose steps something is asked for."""
    signals.LOOK_SECONDS, original, step = 0.01, loop.train_step, iter(range(999))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored

    def asking(*args: Any, **kwargs: Any) -> Any:
        now = next(step)
        for rank, when, what in asks:
            if (rank, when) == (world.rank, now):
                ask(folder, what)
        return original(*args, **kwargs)

    loop.train_step = asking
    return start(world, parts, folder, sections)


def reason(folder: Path, code: int = 75) -> str:
    written = json.loads((folder / "exit.json").read_text())
    assert written["code"] == code
    return str(written["reason"])


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """The run that nobody stops, by ranks and strategy."""
    made: dict[tuple[int, str], Path] = {}

    def run(size: int, strategy: str) -> Path:
        if (size, strategy) not in made:
            folder = made[size, strategy] = tmp_path_factory.mktemp("whole") / "run"
            answers = run_ranks(start, size, parts, folder, {**RARELY, "parallel": {"strategy": strategy}})
            assert {answer.code for answer in answers} == {0}
        return made[size, strategy]

    return run


@pytest.mark.parametrize(
    ("size", "strategy", "asks"),
    [
        pytest.param(3, "ddp", ((1, 2, "SIGTERM"),), marks=pytest.mark.long),
        (2, "fsdp", ((1, 2, "SIGTERM"), (1, 3, "SIGTERM"))),
        pytest.param(2, "ddp", ((1, 0, "SIGUSR1"),), marks=pytest.mark.long),
        (1, "ddp", ((0, 2, "SIGINT"), (0, 3, "SIGINT"))),
        pytest.param(2, "ddp", ((0, 1, "STOP"),), marks=pytest.mark.long),
    ],
)
def test_a_request_stops_all_ranks_after_the_same_step_and_nothing_is_lost(
    parts: Path, tmp_path: Path, whole: Callable[[int, str], Path], size: int, strategy: str, asks: tuple[Ask, ...]
) -> None:
    """On one rank or all, and twice: signals within seconds of the first are the same one."""
    sections, folder = {**RARELY, "parallel": {"strategy": strategy}}, tmp_path / "run"
    answers = run_ranks(start_asked, size, parts, folder, sections, asks)
    assert {answer.code for answer in answers} == {75}
    (done,) = {len(answer.seen) for answer in answers}
    assert asks[0][1] + 1 <= done <= asks[0][1] + 3
    assert checkpoints(folder) == [done] and not (folder / "final").exists()
    assert f"checkpoint-{done} is written" in reason(folder)
    answers = run_ranks(start, size, parts, folder, sections)
    assert {(answer.code, len(answer.seen)) for answer in answers} == {(0, 8 - done)}
    assert weights(folder) == weights(whole(size, strategy))


@pytest.mark.long
def test_save_and_evaluate_between_lines_of_the_log(parts: Path, tmp_path: Path) -> None:
    """Each once, on all ranks after the same step, and training goes on to the same bytes."""
    validation = {"data": {"validation": [{"path": str(parts / "train.json"), "media_root": str(parts / "images")}]}}
    sections = {**merged(RARELY, validation), "validation": {"every": 99, "max_samples": 4}}
    asks = ((0, 1, "SAVE"), (0, 4, "EVAL"))
    answers = run_ranks(start_asked, 2, parts, tmp_path / "asked", sections, asks)
    assert {(answer.code, len(answer.seen)) for answer in answers} == {(0, 8)}
    saved, last = checkpoints(tmp_path / "asked")
    assert 2 <= saved <= 4 and last == 8
    lines = [json.loads(line) for line in (tmp_path / "asked" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "val/loss" in line]
    assert len(evaluated) == 2 and 5 <= evaluated[0] <= 7 and evaluated[1] == 8
    assert not [answer for answer in run_ranks(start, 2, parts, tmp_path / "plain", sections) if answer.code]
    assert weights(tmp_path / "asked") == weights(tmp_path / "plain")


def start_counting_saves(world: World, parts: Path, folder: Path, sections: dict[str, Any], asks: tuple[Ask, ...]) -> list[int]:
    saved, original = [], Checkpointer.save

    def save(self: Checkpointer, step: int, *args: Any) -> Any:
        saved.append(step)
        return original(self, step, *args)

    Checkpointer.save = save  # type: ignore[method-assign, assignment]
    answer = start_asked(world, parts, folder, sections, asks)
    assert answer.code == 0 and ("no [[data.validation]]" in answer.said) == ("EVAL" in str(asks)), answer.said
    return saved


def test_what_is_saved_anyway_is_saved_once(parts: Path, tmp_path: Path) -> None:
    sections = merged(RARELY, {"checkpoint": {"every": 2}, "train": {"max_steps": 6}})
    asks = tuple((0, step, name) for step in (1, 3) for name in ("SAVE", "EVAL"))
    saved = run_ranks(start_counting_saves, 1, parts, tmp_path / "run", sections, asks)[0]
    assert saved == [2, 4, 6]


def test_a_stop_in_the_last_step_changes_nothing(parts: Path, tmp_path: Path, whole: Callable[[int, str], Path]) -> None:
    """What was left from before the start is none of this run either."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "STOP").touch()
    answer = run_ranks(start_asked, 1, parts, folder, RARELY, ((0, 7, "STOP"),))[0]
    assert (answer.code, len(answer.seen)) == (0, 8)
    assert weights(folder) == weights(whole(1, "ddp"))


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_stop_at_the_end_of_a_stage_waits_for_its_final(parts: Path, tmp_path: Path, step: int) -> None:
    stages = [{"name": "one", "train": {"max_steps": 3}}, {"name": "two", "train": {"max_steps": 2}}]
    sections = {**LORA, **NEVER, "stage": stages}
    answers = run_ranks(start_asked, 2, parts, tmp_path / "run", sections, ((1, step, "SIGTERM"),))
    assert {(answer.code, len(answer.seen)) for answer in answers} == {(75, 3)}
    assert (tmp_path / "run" / "stages" / "01-one" / "final").is_dir() and not (tmp_path / "run" / "stages" / "02-two").exists()
    assert "stage 1 of 2" in reason(tmp_path / "run")
    for folder in ("run", "plain"):
        assert {answer.code for answer in run_ranks(start, 2, parts, tmp_path / folder, sections)} == {0}
    assert finals(tmp_path / "run") == finals(tmp_path / "plain")


def start_saving(world: World, parts: Path, folder: Path, sections: dict[str, Any]) -> Start:
    """SIGTERM while checkpoint-2 is being written."""
    original = Checkpointer.save

    def save(self: Checkpointer, step: int, *args: Any) -> Any:
        if step == 2 and world.rank == 1:
            ask(folder, "SIGTERM")
        return original(self, step, *args)

    Checkpointer.save = save  # type: ignore[method-assign, assignment]
    return start(world, parts, folder, sections)


@pytest.mark.long
def test_a_signal_during_a_save(parts: Path, tmp_path: Path, whole: Callable[[int, str], Path]) -> None:
    sections = merged(RARELY, {"checkpoint": {"every": 2}})
    answers = run_ranks(start_saving, 2, parts, tmp_path / "run", sections)
    assert {answer.code for answer in answers} == {75}
    assert checkpoints(tmp_path / "run")[0] == 2
    assert {answer.code for answer in run_ranks(start, 2, parts, tmp_path / "run", sections)} == {0}
    assert weights(tmp_path / "run") == weights(whole(2, "ddp"))


def codes_of(fn: Callable[..., Any], size: int, *args: Any, act: Callable[[list[int]], None] = lambda pids: None) -> list[int]:
    """Exit codes of ranks that leave on their own; `act` is given their process ids."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [SERVER.Pipe() for _ in range(size)]
        store, seconds = f"{folder}/store", 60.0
        started = [
            SERVER.Process(target=ranks._rank, args=(fn, rank, size, store, theirs, args, seconds))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in started:
            process.start()
        try:
            act([process.pid or 0 for process in started])
            for process in started:
                process.join(seconds)
            return [-999 if process.exitcode is None else process.exitcode for process in started]
        finally:
            for process in started:
                process.kill()
                process.join()


def leave_hanging(world: World, parts: Path, folder: Path, sections: dict[str, Any], asks: tuple[str, ...]) -> None:
    """A run whose third step never ends, and what it is asked there; "peer" stands for another rank that fails."""
    signals.SAME_SECONDS, signals.LOOK_SECONDS, original, step = 0.1, 0.01, loop.train_step, iter(range(999))

    def hanging(*args: Any, **kwargs: Any) -> Any:
        if next(step) == 2:
            for what in asks:
                exit_report.record_exit(folder, RunEnd(70, "of a peer", 2, 1)) if what == "peer" else ask(folder, what)
            time.sleep(60)
        return original(*args, **kwargs)

    loop.train_step = hanging
    os._exit(start(world, parts, folder, sections).code)


@pytest.mark.parametrize(
    ("asks", "seconds", "code", "told"),
    [
        (("SIGTERM", "SIGTERM"), 60.0, 75, "SIGTERM while the run was stopping; the last checkpoint is checkpoint-2"),
        (("STOP",), 0.5, 75, "could not save within faults.grace_seconds = 0.5; the last checkpoint is checkpoint-2"),
        (("peer", "SIGTERM"), 60.0, 70, "of a peer"),
    ],
)
def test_a_run_that_cannot_finish_its_step_leaves_without_harm(
    parts: Path, tmp_path: Path, whole: Callable[[int, str], Path], asks: tuple[str, ...], seconds: float, code: int, told: str
) -> None:
    sections, folder = merged(RARELY, {"checkpoint": {"every": 2}, "faults": {"grace_seconds": seconds}}), tmp_path / "run"
    assert codes_of(leave_hanging, 1, parts, folder, sections, asks) == [code]
    assert reason(folder, code) == told
    assert start_alone(parts, folder, sections).code == 0
    assert weights(folder) == weights(whole(1, "ddp"))


def leave_loading(world: World, parts: Path, folder: Path, sections: dict[str, Any]) -> None:
    def loading(*args: Any, **kwargs: Any) -> None:
        ask(folder, "SIGTERM")
        time.sleep(60)

    run.open_data = loading  # type: ignore[assignment]
    os._exit(start(world, parts, folder, sections).code)


def test_before_the_first_step_a_signal_ends_the_run_at_once(parts: Path, tmp_path: Path) -> None:
    assert codes_of(leave_loading, 1, parts, tmp_path / "run", RARELY) == [75]
    assert reason(tmp_path / "run") == "SIGTERM before the first step; there is no checkpoint yet"
    assert start_alone(parts, tmp_path / "run", RARELY).code == 0


def test_handlers_are_there_while_a_run_is_and_only_then(tmp_path: Path) -> None:
    status, before = exit_report.RunStatus(), [signal.getsignal(number) for number in signals.SIGNALS]
    status.requests.accepting = True
    with signals.listening(tmp_path, 0, status, 60.0):
        os.kill(os.getpid(), signal.SIGCHLD)  # none of ours
        time.sleep(0.05)
        assert not status.requests.reasons
        os.kill(os.getpid(), signal.SIGTERM)
        while not status.requests.reasons:
            time.sleep(0.01)
    assert status.requests.reasons == {STOP: "SIGTERM"}
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1 and "signals" not in [thread.name for thread in threading.enumerate()]


def test_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    found: list[Any] = []
    before = [signal.getsignal(number) for number in signals.SIGNALS]

    def listen() -> None:
        with signals.listening(tmp_path, 0, exit_report.RunStatus(), 60.0):
            found.extend(signal.getsignal(number) for number in signals.SIGNALS)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == before


def work() -> None:
    prepare_worker(0)
    deaf = all(signal.getsignal(number) is signal.SIG_IGN for number in signals.SIGNALS)
    os._exit(0 if deaf and signal.set_wakeup_fd(-1) == -1 else 1)


def worker_code(world: World, folder: Path) -> int | None:
    with signals.listening(folder, 0, exit_report.RunStatus(), 60.0):
        worker = multiprocessing.Process(target=work)
        worker.start()
        worker.join()
        return worker.exitcode


def test_a_data_worker_hears_nothing_and_passes_nothing_on(tmp_path: Path) -> None:
    assert run_ranks(worker_code, 1, tmp_path) == [0]


def test_a_wish_is_told_once_and_fulfilled_once() -> None:
    """The step it is fulfilled in has told its own notes already."""
    requests = Requests()
    requests.add(SAVE, "SAVE")
    assert (requests.announce(), requests.announce()) == ([0.0, 1.0, 0.0], [0.0, 0.0, 0.0])
    requests.observe([0.0, 1.0, 0.0])
    assert requests.reason(SAVE) == "SAVE" and requests.consume(SAVE) and not requests.consume(SAVE)
    requests.add(SAVE, "again")
    assert requests.announce() == [0.0, 1.0, 0.0]
    requests.observe([2.0, 0.0, 1.0])
    assert requests.reason(STOP) == "asked of another rank" and requests.consume(EVALUATE) and requests.consume(STOP)


def test_torchrun_does_not_restart_what_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    exit_report.record_exit(tmp_path, RunEnd(75, "STOP", 3, 0))
    signals.check_restart(tmp_path)  # the first start of a launch
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(errors.StopRequested, match="not restarted: STOP"):
        signals.check_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    signals.check_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for code, reason in ((70, "failed"), (75, "SIGTERM before the first step; there is no checkpoint yet")):
        (tmp_path / "exit.json").unlink()
        exit_report.record_exit(tmp_path, RunEnd(code, reason, 3, 0))
        signals.check_restart(tmp_path)


def test_a_launcher_that_kills_too_soon_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert signals.launcher_lines(120.0) == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    (line,) = signals.launcher_lines(120.0)
    assert "30 s after SIGTERM" in line and ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=130" in line or "30 or less" in line)
    assert signals.launcher_lines(30.0) == []
    monkeypatch.setattr(LaunchConfig, "__dataclass_fields__", {"shutdown_timeout": None})
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "130")
    assert signals.launcher_lines(120.0) == []
    monkeypatch.setattr(LaunchConfig, "__dataclass_fields__", {})
    assert "30 or less" in signals.launcher_lines(120.0)[0]


def leave(world: World, parts: Path, folder: Path, sections: dict[str, Any]) -> None:
    os._exit(start(world, parts, folder, sections).code)


def listens(pid: int) -> bool:
    """Whether a process has a handler for the signals, or is there no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return "SigCgt:" not in status or bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_asked_at_random_instants_it_ends_with_the_same_bytes(parts: Path, tmp_path: Path, strategy: str) -> None:
    """Signals to one rank or to both until fifteen starts were ended by them, over as many runs as end in the meantime."""
    sections = {
        **LORA,
        "train": {"max_steps": 40},
        "checkpoint": {"every": 7, "keep": 2},
        "log": {"every": 1},
        "parallel": {"strategy": strategy},
        "data": {"workers": 1},
    }
    plain = tmp_path / "plain"
    began = 0.0

    def wait_for_it(pids: list[int]) -> None:
        nonlocal began
        while not all(listens(pid) for pid in pids):
            time.sleep(0.02)
        began = time.monotonic()

    assert codes_of(leave, 2, parts, plain, sections, act=wait_for_it) == [0, 0]
    seconds, draw = time.monotonic() - began, random.Random(0)
    num_stopped = runs = num_agreed = 0
    while num_stopped < 15:
        runs += 1
        folder, codes = tmp_path / f"asked{runs}", [1, 1]
        while codes != [0, 0]:
            number = draw.choice(["SIGTERM", "SIGUSR1"])
            whom, after = draw.choice([(0,), (1,), (0, 1)]), draw.uniform(0, seconds)

            def act(pids: list[int], whom: tuple[int, ...] = whom, number: str = number, after: float = after) -> None:
                while not all(listens(pid) for pid in pids):  # before, a launcher would have to end those that wait for it
                    time.sleep(0.02)
                time.sleep(after)
                for rank in whom:
                    with suppress(ProcessLookupError):  # it has ended
                        os.kill(pids[rank], signal.Signals[number])

            codes = codes_of(leave, 2, parts, folder, sections, act=act)
            assert set(codes) <= {0, 75, 1}, codes  # 1: its peer left
            num_stopped += codes != [0, 0]
            num_agreed += codes == [75, 75]
        assert weights(folder) == weights(plain)
        assert metrics(folder) == metrics(plain)
        assert not list(folder.glob("damaged-*"))
    print(f"{strategy}: {num_stopped} starts ended by a signal, {num_agreed} of them with 75 on both ranks, {runs} runs")
    assert num_agreed >= 3
