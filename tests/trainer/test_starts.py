"""Several starts in one process, and several in one folder: none is in another's way."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.errors import ConfigError
from tests.support.lock import Holder
from tests.support.ranks import run_ranks
from tests.support.runs import config_of, tables
from trainer import main
from trainer.distributed import world as distributed
from trainer.distributed.world import World
from trainer.faults import exit_report, signals
from trainer.runfile.toml_files import to_toml


def start_again(world: World, parts: Path, folder: Path) -> tuple[list[int], list[str]]:
    """As from a notebook: a start that fails, one that does not, and one from a thread that finds nothing left to do."""
    dist.destroy_process_group()
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    wrong = config_of(parts, output_dir=str(folder / "wrong"), model={"init_from": str(folder / "nothing")})
    right = config_of(parts, output_dir=str(folder / "right"), train={"max_steps": 1})
    codes = [main.run(wrong), main.run(right)]
    thread = threading.Thread(target=lambda: codes.append(main.run(right)))
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before and signal.set_wakeup_fd(-1) == -1
    return codes, [t.name for t in threading.enumerate() if t.name in ("signals", "lease")]


def test_a_process_may_start_one_run_after_another(parts: Path, tmp_path: Path) -> None:
    assert run_ranks(start_again, 1, parts, tmp_path) == [([2, 0, 0], [])]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder into which another process trains."""
    folder = tmp_path / "run"
    folder.mkdir()
    holder = Holder("lock", folder)
    yield folder
    holder.end()


def test_a_wrong_run_file_tells_nothing_in_the_folder_of_a_run(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That run would take it for the word of a rank of its own: at a signal it would leave, and save nothing."""
    (held.parent / "run.toml").write_text(f'output_dir = "{held}"\nsed = 1\n')
    assert main.main(["--cfg", str(held.parent / "run.toml")]) == 2
    assert "sed is not a setting" in capsys.readouterr().err and not (held / "exit.json").exists()


def test_who_waits_for_a_folder_in_vain_tells_nothing_there(
    held: Path, parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.machine.folder_lock.time.sleep", interrupted)
    assert main.run(config_of(parts, output_dir=str(held))) == 130
    assert "interrupted" in capsys.readouterr().err and not (held / "exit.json").exists()


@pytest.mark.parametrize("has_met", [False, True])
def test_a_rank_that_has_not_met_the_others_does_not_know_whose_folder_it_is(
    has_met: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of its start may have found the folder taken, whereupon torchrun ends the others."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("trainer.faults.signals.os._exit", leave)
    listener = signals.Listener(tmp_path, 1, exit_report.RunStatus(has_met=has_met), 60.0)
    with pytest.raises(SystemExit, match="75"):
        listener._stop("SIGTERM")
    assert (tmp_path / "exit.json").exists() == has_met


def test_a_folder_that_fails_keeps_nobody_from_leaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    def leave(code: int) -> None:
        raise SystemExit(code)

    listener = signals.Listener(tmp_path, 0, exit_report.RunStatus(), 60.0)
    monkeypatch.setattr("trainer.faults.signals.os._exit", leave)
    for name in ("is_dir", "glob", "open", "write_text"):
        monkeypatch.setattr(Path, name, stale)
    with pytest.raises(SystemExit, match="75"):
        listener._stop("SIGTERM")


def test_a_folder_that_hangs_holds_no_run_up_that_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, goes_on = threading.Event(), threading.Event()

    def hanging(self: signals.Listener, name: str) -> bool:
        if threading.current_thread() is self.thread:
            reached.set()
            goes_on.wait()
        return False

    monkeypatch.setattr(signals.Listener, "_removed", hanging)
    monkeypatch.setattr(signals, "LOOK_SECONDS", 0.01)
    with signals.listening(tmp_path, 0, exit_report.RunStatus(), 60.0):
        reached.wait()
    (left,) = [thread for thread in threading.enumerate() if thread.name == "signals"]
    goes_on.set()
    left.join()


def test_exit_json_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full nobody claims to have told, so whoever speaks does."""

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert exit_report.record_exit(tmp_path, exit_report.RunEnd(70, "a", 1, 1), speaks=True) and not exit_report.record_exit(
            tmp_path, exit_report.RunEnd(70, "a", 1, 1)
        )
    assert not list(tmp_path.iterdir())
    assert exit_report.record_exit(tmp_path, exit_report.RunEnd(70, "a", 1, 1)) and not exit_report.record_exit(
        tmp_path, exit_report.RunEnd(75, "b", 1, 0)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "a"


def test_more_ranks_than_devices_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "6"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"rank 6 is number 2 .* has 2 .*--nproc_per_node=2"):
        distributed.start_world()


def test_an_error_of_a_device_is_left_to_the_rank_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def meet() -> None:
        raise ConfigError("not met")

    monkeypatch.setenv("TORCH_NCCL_RETHROW_CUDA_ERRORS", "1")
    monkeypatch.delenv("TORCH_NCCL_RETHROW_CUDA_ERRORS")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "join_store", meet)
    with pytest.raises(ConfigError, match="not met"):
        distributed.start_world()
    assert os.environ["TORCH_NCCL_RETHROW_CUDA_ERRORS"] == "0"


def test_a_run_file_whose_folder_is_in_the_way_is_told(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").mkdir()
    (tmp_path / "run.toml").write_text(to_toml({**tables(parts), "output_dir": str(tmp_path / "run"), "sed": 1}))
    assert main.main(["--cfg", str(tmp_path / "run.toml")]) == 2
