"""Signals, and files in the run folder, that ask a run to stop, save or evaluate.

A thread hears them: while the main thread waits in a collective no Python handler runs. Whatever happens here, checkpoints stay as
they are: they cannot be torn, so leaving at once costs the steps since the last one and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig

from trainer import errors
from trainer.checkpoint.retention import checkpoints
from trainer.errors import StopRequested
from trainer.faults import exit_report
from trainer.faults.exit_report import RunStatus
from trainer.faults.requests import EVALUATE, SAVE, STOP

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUESTS = {"STOP": STOP, "SAVE": SAVE, "EVAL": EVALUATE}
"""Files that people make in the run folder, and what they wish by it."""
SAME_SECONDS = 5.0
"""Signals this long after the first are the same request: srun and torchrun both pass it on."""
LOOK_SECONDS = 1.0
TOO_EARLY = "before the first step"
TORCHRUN_SECONDS = 30
"""From SIGTERM to SIGKILL, unless torchrun is told otherwise."""


@contextmanager
def listening(folder: Path, rank: int, progress: RunStatus, grace_seconds: float) -> Iterator[None]:
    """Inside the `with`, signals and requests become wishes of `progress.steering`, and KeyboardInterrupt does not occur.

    Where nothing was trained yet, at a second request, and when the run has not ended `grace_seconds` after the first one, the
    process leaves with 75 at once. Only the main thread can take signals: in another one they are left alone.
    """
    listener = Listener(folder, rank, progress, grace_seconds)
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    # What is ignored stays ignored: shells ask for that for what runs in the background.
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    before = signal.set_wakeup_fd(listener.outbox.fileno(), warn_on_full_buffer=False) if main else -1
    for number in handlers:
        signal.signal(number, _pass)  # without a handler in Python nothing is written for the thread
    listener.thread.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if main:
            signal.set_wakeup_fd(before)
        listener.close()


def _pass(number: int, frame: Any) -> None:
    """The thread has heard of it already."""


class Listener:
    """The thread that hears requests, and what it remembers of them."""

    def __init__(self, folder: Path, rank: int, progress: RunStatus, grace_seconds: float) -> None:
        self.folder, self.rank, self.progress, self.grace = folder, rank, progress, grace_seconds
        self.inbox, self.outbox = socket.socketpair()
        self.outbox.setblocking(False)
        self.asked: float | None = None  # when this rank was first asked to stop, or learned that another one was
        self.first_signal: float | None = None
        self.ended = False
        self.thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._forget_old()

    def close(self) -> None:
        self.ended = True
        with suppress(BlockingIOError):
            self.outbox.send(b"\0")
        self.thread.join(LOOK_SECONDS)
        if not self.thread.is_alive():  # it may stand in a file system that hangs, and holds nobody else up
            self.inbox.close()
            self.outbox.close()

    def _forget_old(self) -> None:
        """Requests of a run that has ended are none of this one."""
        for name in REQUESTS if self.rank == 0 else ():
            if self._removed(name):
                self._say(f"{self.folder / name} was left from before this start; removed")

    def _run(self) -> None:
        while not self.ended:
            numbers = self._received()
            if self.ended:
                return
            for number in numbers:
                self._signalled(signal.Signals(number).name)
            for name in REQUESTS if self.rank == 0 else ():
                if self._removed(name):
                    self._requested(name)
            self._mind_grace()

    def _received(self) -> list[int]:
        """Numbers of the signals that came; none after a while."""
        seconds = LOOK_SECONDS
        if self.asked is not None:
            seconds = min(seconds, max(0.01, self.asked + self.grace - time.monotonic()))
        self.inbox.settimeout(seconds)
        try:
            return [number for number in self.inbox.recv(4096) if number in SIGNALS]
        except TimeoutError:
            return []

    def _removed(self, name: str) -> bool:
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True

    def _signalled(self, name: str) -> None:
        now = time.monotonic()
        if self.first_signal is not None and now - self.first_signal <= SAME_SECONDS:
            return
        if self.first_signal is not None:
            self._leave(f"{name} while the run was stopping")
        self.first_signal = now
        self._stop(name)

    def _requested(self, name: str) -> None:
        if REQUESTS[name] == STOP:
            self._stop(f"{name} in {self.folder}")
        else:
            self.progress.steering.wish(REQUESTS[name], name)
            self._say(f"{name}: after one of the next steps")

    def _stop(self, reason: str) -> None:
        if not self.progress.steering.heeded:
            self._leave(f"{reason} {TOO_EARLY}")
        self._follow_peer()
        self.asked = self.asked if self.asked is not None else time.monotonic()
        self.progress.steering.wish(STOP, reason)
        if self.rank == 0:
            self._say(f"{reason}: finishing the step, then saving")

    def _follow_peer(self) -> None:
        """Leave when another rank has ended the run: a launcher then stops the others, and there is no step to finish."""
        try:
            code = json.loads((self.folder / exit_report.NAME).read_text())["code"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        os._exit(code)

    def _mind_grace(self) -> None:
        if self.asked is None and STOP in self.progress.steering.agreed:
            self.asked = time.monotonic()
        if self.asked is not None and time.monotonic() - self.asked >= self.grace:
            self._leave(f"could not save within faults.grace_seconds = {self.grace:g}")

    def _leave(self, reason: str) -> None:
        """Record why, and end this process as it stands."""
        last = _last_of(self.folder)
        # Without rank 0 nobody has seen yet whether the folder is this start's, or that of a run under way.
        knows = self.rank == 0 or self.progress.has_met
        if knows and exit_report.record(self.folder, errors.STOPPED, f"{reason}; {last}", self.progress.step, self.rank):
            self._say(f"rank {self.rank} stopped at once: {reason}; {last}")
        os._exit(errors.STOPPED)

    def _say(self, text: str) -> None:
        # Not through sys.stderr: the main thread may be stopped with its lock.
        with suppress(OSError):
            os.write(2, f"trainer: {text}\n".encode(errors="backslashreplace"))


def _last_of(folder: Path) -> str:
    try:
        found = checkpoints(folder)
    except OSError as error:  # whatever is wrong with the folder keeps nobody from leaving
        return f"{folder} cannot be read: {error.strerror}"
    return f"the last checkpoint is {found[-1].name}" if found else "there is no checkpoint yet"


def check_restart(folder: Path) -> None:
    """StopRequested where torchrun restarts a run that was stopped on request: --max-restarts is for those that failed.

    A signal before the first step was torchrun's own, to ranks whose peer had died: asked to end itself, it restarts nobody.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return
    try:
        last = json.loads((folder / exit_report.NAME).read_text())
        stopped = last["code"] == errors.STOPPED and last["launch"] == os.environ.get("TORCHELASTIC_RUN_ID")
        stopped = stopped and TOO_EARLY not in last["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if stopped:
        raise StopRequested(f"not restarted: {last['reason']}")


def launcher_lines(grace_seconds: float) -> list[str]:
    """What to tell when the launcher kills sooner than the run may need to save."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    seconds, can_wait = TORCHRUN_SECONDS, "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    if can_wait and (text := os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")).isdigit():
        seconds = int(text)
    if seconds >= grace_seconds:
        return []
    longer = f"start it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT={int(grace_seconds) + 10} in its environment"
    shorter = f"this torch's torchrun cannot wait longer: set faults.grace_seconds to {seconds} or less"
    return [
        f"signals   torchrun kills its ranks {seconds} s after SIGTERM, and faults.grace_seconds = {grace_seconds:g}: "
        f"{longer if can_wait else shorter}"
    ]
