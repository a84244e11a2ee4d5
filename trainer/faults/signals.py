"""Signals, and files in the run folder, that ask a run to stop, save or evaluate.

A thread receives them: while the main thread waits in a collective, no Python signal handler runs. Checkpoints stay as they are
whatever happens here: they cannot be torn, so leaving at once costs the steps since the last one and nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer import errors
from trainer.checkpoint.retention import checkpoints
from trainer.errors import StopRequested
from trainer.faults import exit_report
from trainer.faults.exit_report import RunStatus
from trainer.faults.requests import EVALUATE, SAVE, STOP

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUESTS = {"STOP": STOP, "SAVE": SAVE, "EVAL": EVALUATE}
"""Files that people create in the run folder, and the request that each of them makes."""
SAME_SECONDS = 5.0
"""Signals this soon after the first are the same request: srun and torchrun both pass it on."""
LOOK_SECONDS = 1.0
TOO_EARLY = "before the first step"
TORCHRUN_SECONDS = 30
"""Seconds from SIGTERM to SIGKILL, unless torchrun is configured otherwise."""


@contextmanager
def listening(folder: Path, rank: int, status: RunStatus, grace_seconds: float) -> Iterator[None]:
    """Turn signals and request files into requests of `status.requests` inside the `with`.

    KeyboardInterrupt does not occur there. The process exits at once with code 75 before the first step, at a second request, and
    when the run has not ended `grace_seconds` after the first one. Only the main thread can handle signals: in another thread they
    are left alone.
    """
    listener = Listener(folder, rank, status, grace_seconds)
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    # Ignored signals stay ignored: shells set that for background jobs.
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    before = signal.set_wakeup_fd(listener.outbox.fileno(), warn_on_full_buffer=False) if main else -1
    for number in handlers:
        signal.signal(number, lambda number, frame: None)  # without a handler nothing is written to the wakeup descriptor
    listener.thread.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if main:
            signal.set_wakeup_fd(before)
        listener.close()


class Listener:
    """Thread that receives requests, and the state that it keeps of them."""

    def __init__(self, folder: Path, rank: int, status: RunStatus, grace_seconds: float) -> None:
        self.folder, self.rank, self.status, self.grace = folder, rank, status, grace_seconds
        self.inbox, self.outbox = socket.socketpair()
        self.outbox.setblocking(False)
        self.requested_at: float | None = None  # when this rank was asked to stop, or learned that another rank was
        self.first_signal: float | None = None
        self.ended = False
        self.thread = threading.Thread(target=self._run, name="signals", daemon=True)
        for name in REQUESTS if rank == 0 else ():  # made before this start: meant for an earlier run
            if self._removed(name):
                self._say(f"{folder / name} was left from before this start; removed")

    def close(self) -> None:
        self.ended = True
        with suppress(BlockingIOError):
            self.outbox.send(b"\0")
        self.thread.join(LOOK_SECONDS)
        if not self.thread.is_alive():  # it may be blocked by a file system that hangs, and then is left alone
            self.inbox.close()
            self.outbox.close()

    def _run(self) -> None:
        """Handle signals and request files, and watch the grace time, until `close`."""
        while not self.ended:
            numbers = self._received()
            if self.ended:
                return
            for number in numbers:
                self._signalled(signal.Signals(number).name)
            for name in REQUESTS if self.rank == 0 else ():
                if self._removed(name):
                    self._requested(name)
            self._check_grace()

    def _received(self) -> list[int]:
        """Wait up to LOOK_SECONDS for signals; return their numbers."""
        seconds = LOOK_SECONDS
        if self.requested_at is not None:
            seconds = min(seconds, max(0.01, self.requested_at + self.grace - time.monotonic()))
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
        """Stop the run at the first signal; leave at once at a later one that is no copy of the first."""
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
            self.status.requests.add(REQUESTS[name], name)
            self._say(f"{name}: after one of the next steps")

    def _stop(self, reason: str) -> None:
        """Request a stop of the run; leave at once before the first step."""
        if not self.status.requests.accepting:
            self._leave(f"{reason} {TOO_EARLY}")
        self._follow_peer()
        self.requested_at = self.requested_at if self.requested_at is not None else time.monotonic()
        self.status.requests.add(STOP, reason)
        if self.rank == 0:
            self._say(f"{reason}: finishing the step, then saving")

    def _follow_peer(self) -> None:
        """Exit when another rank has ended the run: a launcher then stops the others, and there is no step to finish."""
        if found := exit_report.read_exit_report(self.folder):
            os._exit(found["code"])

    def _check_grace(self) -> None:
        """Leave at once when `grace` seconds have passed since the request to stop."""
        if self.requested_at is None and STOP in self.status.requests.agreed:
            self.requested_at = time.monotonic()
        if self.requested_at is not None and time.monotonic() - self.requested_at >= self.grace:
            self._leave(f"could not save within faults.grace_seconds = {self.grace:g}")

    def _leave(self, reason: str) -> None:
        """Record the reason in exit.json, and exit at once."""
        last = _last_checkpoint(self.folder)
        # Only rank 0 holds the folder lock: before the ranks have met, the folder may belong to another run.
        knows = self.rank == 0 or self.status.has_met
        end = exit_report.RunEnd(errors.STOPPED, f"{reason}; {last}", self.status.step, self.rank)
        speaks = knows and exit_report.record_exit(self.folder, end)
        exit_report.write_error_file(end, is_first=speaks)
        if speaks:
            self._say(f"rank {self.rank} stopped at once: {reason}; {last}")
        os._exit(errors.STOPPED)

    def _say(self, text: str) -> None:
        """Print a line to stderr, on any thread."""
        # Not through sys.stderr: the main thread may be blocked while it holds the stream's lock.
        with suppress(OSError):
            os.write(2, f"trainer: {text}\n".encode(errors="backslashreplace"))


def _last_checkpoint(folder: Path) -> str:
    """Name the newest checkpoint, for people."""
    try:
        found = checkpoints(folder)
    except OSError as error:  # no error of the folder may prevent the exit
        return f"{folder} cannot be read: {error.strerror}"
    return f"the last checkpoint is {found[-1].name}" if found else "there is no checkpoint yet"


def check_restart(folder: Path) -> None:
    """Raise StopRequested where torchrun restarts a run that was stopped on request: --max-restarts is for failed runs.

    A signal before the first step came from torchrun itself, to ranks whose peer had died: when torchrun is asked to stop, it
    restarts no rank.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return
    last = exit_report.read_exit_report(folder)
    is_of_launch = last is not None and last.get("launch") == os.environ.get("TORCHELASTIC_RUN_ID")
    if last and is_of_launch and last["code"] == errors.STOPPED and TOO_EARLY not in last["reason"]:
        raise StopRequested(f"not restarted: {last['reason']}")


def launcher_lines(grace_seconds: float) -> list[str]:
    """Return a warning when the launcher kills its ranks sooner than the run may need to save."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    from torch.distributed.launcher.api import LaunchConfig  # here: only ranks of torchrun need it, which has imported it

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
