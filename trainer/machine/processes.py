"""Other processes of this machine: whether they live, and how one is made to show where it stands and to end."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GONE, DEFUNCT, HALTED, RUNNING = "gone", "defunct", "stopped", "running"


@dataclass(frozen=True)
class Process:
    """A process that is known again for sure: numbers are used anew, and several containers may have the same host name."""

    host: str
    machine: str  # its boot and its space of process numbers
    pid: int
    started: str  # clock ticks after the boot

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def state(self) -> str | None:
        """GONE, DEFUNCT (ended, not yet waited for), HALTED (SIGSTOP, or a debugger) or RUNNING; None on another machine."""
        if self.machine != machine():
            return None
        letter, started = _stat(self.pid)
        if not letter or (started and started != self.started):
            return GONE
        return {"Z": DEFUNCT, "X": GONE, "T": HALTED, "t": HALTED}.get(letter, RUNNING)


def myself() -> Process:
    return Process(socket.gethostname(), machine(), os.getpid(), _stat(os.getpid())[1])


def machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _stat(pid: int) -> tuple[str, str]:
    """State and start time from /proc; ("", "") when there is no such process. Without /proc the state is "?"."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
        return "?" if not Path("/proc/self/stat").exists() else "", ""
    except ProcessLookupError:
        return "", ""
    except PermissionError:
        return "?", ""


def show_and_end(process: Process, seconds: float = 4.0) -> None:
    """Wake a process, so that it leaves by itself; else have it write its stacks (`trainer.faults.stack_dumps`) and kill it."""
    if process.state() in (None, GONE, DEFUNCT) or process.pid == os.getpid():
        return
    try:
        os.kill(process.pid, signal.SIGCONT)
        if _left(process, seconds / 2):
            return
        # Not before: while other threads run, an interpreter that writes down their stacks from a signal may crash.
        os.kill(process.pid, signal.SIGUSR2)
        if not _left(process, seconds / 2):
            os.kill(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _left(process: Process, seconds: float) -> bool:
    """Whether it ends in that time."""
    end = time.monotonic() + seconds
    while process.state() not in (GONE, DEFUNCT):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
