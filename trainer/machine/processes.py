"""Processes of this machine: their state, a way to make one write its stacks and end, and how much this one reads and writes."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

END_SECONDS = 2.0
GONE, DEFUNCT, HALTED, RUNNING = "gone", "defunct", "stopped", "running"


class ProcessFacts(TypedDict):
    """The fields of a `Process`, as they travel."""

    host: str
    machine: str
    pid: int
    started: str


@dataclass(frozen=True)
class Process:
    """Identity of a process that is never mistaken for another: pids are reused, and containers may share a host name."""

    host: str
    machine: str  # boot id and pid namespace
    pid: int
    started: str  # start time in clock ticks since the boot

    def to_json(self) -> ProcessFacts:
        return {"host": self.host, "machine": self.machine, "pid": self.pid, "started": self.started}

    def state(self) -> str | None:
        """Return GONE, DEFUNCT (ended, not yet waited for), HALTED (SIGSTOP, or a debugger) or RUNNING; None on another machine."""
        if self.machine != machine():
            return None
        letter, started = _stat(self.pid)
        if not letter or (started and started != self.started):
            return GONE
        return {"Z": DEFUNCT, "X": GONE, "T": HALTED, "t": HALTED}.get(letter, RUNNING)


def current_process() -> Process:
    """Return the identity of this process."""
    return Process(socket.gethostname(), machine(), os.getpid(), _stat(os.getpid())[1])


def machine() -> str:
    """Return an identifier of the running boot and the pid namespace, or the host name where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _stat(pid: int) -> tuple[str, str]:
    """Return state and start time from /proc; ("", "") when there is no such process. Without /proc the state is "?"."""
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


def show_and_end(process: Process) -> None:
    """Wake a process, so that it leaves by itself; else have it write its stacks (`trainer.faults.stack_dumps`), then kill it.

    Waits 2 * END_SECONDS at most. Nothing is done to this process, to an ended one or to one on another machine.
    """
    if process.state() in (None, GONE, DEFUNCT) or process.pid == os.getpid():
        return
    try:
        os.kill(process.pid, signal.SIGCONT)
        if _has_ended(process):
            return
        # Not earlier: an interpreter that dumps stacks from a signal handler while other threads run may crash.
        os.kill(process.pid, signal.SIGUSR2)
        if not _has_ended(process):
            os.kill(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _has_ended(process: Process) -> bool:
    """Return whether a process ends within END_SECONDS."""
    end = time.monotonic() + END_SECONDS
    while process.state() not in (GONE, DEFUNCT):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


COUNTERS = Path("/proc/self/io")
STEP = 1 << 24
"""Bytes that count as a sign of progress; what the threads of a rank read and write beside its work is a thousandth of it in a
minute."""
COUNTED = ("rchar", "wchar", "read_bytes")
"""Counters of /proc/self/io: bytes of read and write calls, cached ones included, and bytes read from a disk, by mapped files too.
"""


def traffic() -> int:
    """Return how many times STEP bytes have been read or written since the process began.

    Where the system does not count them, the result grows with time: then no phase that is judged by it is found to hang.
    """
    try:
        facts = dict(line.split(": ") for line in COUNTERS.read_text().splitlines())
        return sum(int(facts[name]) for name in COUNTED) // STEP
    except (OSError, ValueError, KeyError):
        return int(time.monotonic())
