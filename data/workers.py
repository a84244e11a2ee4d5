"""Worker processes that read samples: what each is reading, what to say when one dies, and that none outlives its rank."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType

import torch
from torch.utils.data import get_worker_info

from data.dataset import MultimodalDataset
from data.records.record import RecordError
from model.errors import ConfigError

NOTHING = -1
DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) ((?:is killed by signal|exited unexpectedly)[^.]*)")
"""Message by which torch tells that a worker is dead."""

OPEN_FILES = (
    "it has as many files open as a process may have here: raise the limit (`ulimit -n`, LimitNOFILE of a service), or lower "
    "data.workers"
)
NO_FILE = (errno.EMFILE, errno.ENFILE)
NO_FILE_CODE = 71
"""Exit code of a worker that can open no more files, as sysexits.h calls it: EX_OSERR."""

DEATH_SECONDS = 1.0  # how long to wait for a death: what a worker sends breaks off a little before


class WorkerError(RuntimeError):
    """A worker died, or met an error that no record should cause. The message names the samples it was reading."""


class OpenFilesError(WorkerError):
    """A process may open no more files, so that no batch gets from a worker to its rank."""

    exit_code = ConfigError.exit_code  # a limit is set wrongly, and the next start would meet it again


class Reading:
    """Table of the sample that each worker is reading, in memory that they share: any thread of the rank may look.

    Without workers the rank's main thread is the only one that reads.
    """

    def __init__(self, workers: int) -> None:
        self.codes: dict[int, int | None] = {}  # exit codes that torch has asked for
        self._table = torch.full((max(workers, 1), 2), NOTHING, dtype=torch.int64).share_memory_()  # process, sample

    def begin(self, sample_id: int) -> None:
        self._row()[1] = sample_id

    def end(self) -> None:
        self._row()[1] = NOTHING

    def own(self) -> list[int]:
        """Return what the calling process is reading."""
        return [int(i) for i in self._row()[1:] if i != NOTHING]

    def samples(self, pid: int | None = None) -> list[int]:
        """Return what all of them are reading, or what process `pid` is reading."""
        return [sample for process, sample in self._table.tolist() if sample != NOTHING and pid in (None, process)]

    def pids(self) -> list[int]:
        """Return the process ids of workers that have begun, without the rank itself."""
        return [process for process, _ in self._table.tolist() if process not in (NOTHING, os.getpid())]

    def deaths(self) -> dict[int, str]:
        """Return what ended each worker that did not end by itself, by process id. For the process that started the workers."""
        found = {}
        for pid in self.pids():
            code = self.codes.get(pid)
            with contextlib.suppress(OSError):  # torch took the exit status, and does not report it
                if status := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
            if code == NO_FILE_CODE:
                found[pid] = f"ended, because {OPEN_FILES},"
            elif code:
                found[pid] = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return found

    def _row(self) -> torch.Tensor:
        """Return the row of the calling process in the table, and write its process id there."""
        info = get_worker_info()
        row = self._table[0 if info is None else info.id]
        row[0] = os.getpid()
        return row


def describe_sample(dataset: MultimodalDataset, sample_id: int) -> str:
    """Return what people call a sample: "id (file:line)"."""
    try:
        record = dataset.record(sample_id, timed=False)
        return f"{record.id} ({record.where})"
    except RecordError as error:
        return f"{error.id} ({error.where})"


def unexpected_error(error: Exception, names: list[str]) -> WorkerError:
    """Make a `WorkerError` of an error that is no fault of a record, with the samples that were read and its traceback."""
    found = WorkerError(f"{type(error).__name__} while {', '.join(names)} was read: {error}")
    found.add_note("".join(traceback.format_exception(error)))
    return found


def explain_worker_death(error: BaseException, reading: Reading | None, name: Callable[[int], str]) -> BaseException:
    """Explain an error that comes from the death of a worker of `reading`: say how the worker died and what it was reading.

    Any other error is returned as it is. Torch reports a death anywhere in the main thread, or what the worker was sending breaks
    off.
    """
    if reading is None or isinstance(error, WorkerError) or not isinstance(error, (RuntimeError, OSError, EOFError)):
        return error
    named_in = DEATH.search(str(error))
    broke_off = isinstance(error, (EOFError, ConnectionError))
    end = time.monotonic() + (DEATH_SECONDS if broke_off else 0.0)
    while not (deaths := reading.deaths()) and time.monotonic() < end:
        time.sleep(0.02)
    if named_in and not deaths:
        deaths = {int(named_in[1]): named_in[2]}
    if not deaths:
        return error
    pid, how = next(iter(deaths.items()))
    names = [name(i) for i in reading.samples(pid)]
    work = f"read {', '.join(names)}" if names else "waited for work"
    memory = ": the machine may have run out of memory (see dmesg)" if "KILL" in how.upper() else ""
    kind = OpenFilesError if OPEN_FILES in how else WorkerError
    explained_error = kind(f"data worker {pid} {how} while it {work}{memory}")
    explained_error.__cause__ = error
    return explained_error


def end_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that forked it ends, as happens when the parent process ends."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # the parent ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def prepare_worker(worker: int) -> None:
    """Prepare a worker process: one thread, no life without its rank, and no reaction to signals.

    A stop request reaches every process of a job, and the main process acts on it. The garbage collector does not look at inherited
    objects: that would copy every page with a Python object of the parent.
    """
    end_with_parent()
    gc.freeze()
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)  # otherwise signals of a worker would be taken for those of the main process
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _end_without_files


def _end_without_files(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the worker where a thread can open no more files.

    The thread of multiprocessing that hands over batches would print a traceback and try again at once, for ever.
    """
    if isinstance(error, OSError) and error.errno in NO_FILE:
        os._exit(NO_FILE_CODE)
    sys.__excepthook__(kind, error, trace)
