"""One process at a time in a run folder: waited for while it dies, refused while it lives, with locks and without."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.lock import KINDS, Holder, prepare
from trainer.errors import BusyError
from trainer.machine import folder_lock as lock
from trainer.machine.folder_lock import FolderLock


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("RELEASE_SECONDS", "RENEW_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(lock, name, getattr(lock, name))
    monkeypatch.setattr(fcntl, "lockf", fcntl.lockf)
    prepare(request.param)
    return str(request.param)


def test_a_living_holder_is_respected_and_a_dead_one_is_not(kind: str, tmp_path: Path) -> None:
    holder = Holder(kind, tmp_path)
    try:
        with pytest.raises(BusyError, match="trains into it; use another one"):
            FolderLock(tmp_path)
        holder.signal(signal.SIGKILL)
        began = time.monotonic()
        FolderLock(tmp_path).release()
        assert time.monotonic() - began < 10.0
    finally:
        holder.end()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("kind", ["lease"], indirect=True)
def test_a_holder_that_slept_finds_out_that_it_lost_the_folder(kind: str, tmp_path: Path) -> None:
    holder = Holder(kind, tmp_path)
    try:
        holder.signal(signal.SIGSTOP)
        taken = FolderLock(tmp_path)
        holder.signal(signal.SIGCONT)
        end = time.monotonic() + 10.0
        problem = ""
        while not problem:
            assert time.monotonic() < end
            holder.pipe.send("problem?")
            problem = holder.pipe.recv()
            time.sleep(0.05)
        assert f"process {os.getpid()} on " in problem and "took the run folder" in problem
        assert json.loads((tmp_path / ".lease").read_text())["id"] and not taken.problem
        taken.release()
        assert not (tmp_path / ".lease").exists()
    finally:
        holder.end()


def test_what_cannot_be_written_is_told_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "gone")
