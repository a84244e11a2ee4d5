"""Phase tracker: what this rank is doing, so that the report of a stall names the rank, the phase and the samples."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.workers import Reading, explain_worker_death
from trainer.faults.shared_page import Heartbeat, SharedPage
from trainer.machine.processes import traffic

VALIDATION = "validation"
BEFORE_UPDATE = ("data", "copy", "count", "forward", "backward", "update")
"""Phases of a step that is not completed yet; `log`, `validation` and `save` come after one."""
STARTING = ("start", "index", "certify", "check", "load", "reference", "restore", "proof")
"""Phases of a start. They are watched as steps are, with longer deadlines: modules are imported in them."""
BY_BYTES = ("start", "index", "load", "restore")
"""Phases in which bytes that are read or written count as progress."""
UNLIMITED = ("final", "done")
"""Phases without a deadline; in every other phase a run has to make progress."""
WAITING = ("torch/distributed/", "torch/autograd/graph.py", "torch/cuda/streams.py")
"""Files in the Python stack of a rank that waits for others: in a collective, in a backward that runs some, or for a device that
does."""


@dataclass(frozen=True)
class Beat:
    """Phase and position of a rank at one moment. `(step, part)` grows alike on all ranks, so it shows which rank is behind."""

    phase: str = "start"
    step: int | None = None  # completed steps of the run
    samples: tuple[int, ...] = ()  # sample ids; below 0: blank
    part: int = 0  # marks since the step changed
    moves: int = 0  # marks and signs of progress since the start
    since: float = 0.0  # time.monotonic() of this process
    at: str = ""  # a file, a record, a tensor: how far the phase has come

    @property
    def position(self) -> tuple[int, int]:
        """Return (step, part), with step -1 before the first step: it orders the positions of ranks."""
        return (-1 if self.step is None else self.step, self.part)


class PhaseTracker:
    """Tracker of the phases that the main thread marks; a mark costs no more than setting an attribute."""

    def __init__(self) -> None:
        self.beat = Beat(since=time.monotonic())
        self.names: dict[str, Callable[[int], str]] = {}  # by split, "train" and "validation": readable name of a sample
        self.reading: Reading | None = None  # which samples the data workers read
        self.shared_page: SharedPage | None = None  # shared memory that gets every beat at once
        self._groups: list[tuple[int, ...]] = []  # samples of each micro-batch of the step
        self._forwards = 0
        self._main = threading.get_ident()

    def mark(self, phase: str) -> None:
        """Begin `phase`, on the same samples as before; each "forward" is of the next micro-batch."""
        beat, samples = self.beat, self.beat.samples
        if phase == "forward" and self._forwards < len(self._groups):
            samples, self._forwards = self._groups[self._forwards], self._forwards + 1
        elif phase == "update":
            samples = tuple(i for group in self._groups for i in group)
        self._set(Beat(phase, beat.step, samples, beat.part + 1, beat.moves + 1, time.monotonic()))

    def begin(self, phase: str, step: int | None, samples: Sequence[Sequence[int]] = ()) -> None:
        """Begin `phase` after `step` completed steps of the run, on `samples`, given by micro-batch."""
        beat = self.beat
        self._groups, self._forwards = [tuple(group) for group in samples], 0
        part = beat.part + 1 if step == beat.step else 0
        flat = tuple(i for group in self._groups for i in group)
        self._set(Beat(phase, step, flat, part, beat.moves + 1, time.monotonic()))

    def report_progress(self, at: str = "") -> None:
        """Report progress inside a long phase, `at` some position, without counting a new part.

        For rank-local work: `mark` must not count what other ranks do not do.
        """
        beat = self.beat
        self._set(Beat(beat.phase, beat.step, beat.samples, beat.part, beat.moves + 1, beat.since, at))

    def _set(self, beat: Beat) -> None:
        """Replace the beat, and write it to the shared memory."""
        if self.shared_page is not None:
            samples = None if beat.samples is self.beat.samples else beat.samples
            self.shared_page.note(beat.phase, beat.step, beat.part, beat.moves, samples)
        self.beat = beat

    def watch_workers(self, reading: Reading, names: Callable[[int], str], split: str) -> Reading:
        """Register the data workers that the main thread waits for, and the readable names of their samples; return `reading`."""
        self.reading, self.names[split] = reading, names
        return reading

    def now(self) -> Heartbeat:
        """Return the beat as JSON. Callable from any thread."""
        beat = self.beat
        read = self.reading.samples() if self.reading is not None and beat.phase in (VALIDATION, "data") else []
        samples = read or [i for i in beat.samples if i >= 0]
        return {
            "phase": beat.phase,
            "step": beat.step,
            "samples": samples[:32],
            "position": beat.position,
            "page": str(self.shared_page.path) if self.shared_page else None,
            "moves": beat.moves,
            "bytes": traffic() if beat.phase in BY_BYTES else 0,
            "at": beat.at,
            "seconds": round(time.monotonic() - beat.since, 3),
            "waiting": is_waiting(self._main),
        }

    def name(self, sample_id: int, phase: str) -> str:
        """Return the readable name of a sample, as far as this rank knows one. It may read files."""
        name = self.names.get(VALIDATION if phase == VALIDATION else "train")
        return f"sample {sample_id}" if name is None else name(sample_id)

    def explained(self, error: BaseException) -> BaseException:
        """Return `error`, or a clearer one where it says that a data worker died."""
        return explain_worker_death(error, self.reading, lambda i: self.name(i, self.beat.phase))


def is_waiting(thread: int) -> bool:
    """Return whether a thread waits in a collective, as far as its Python frames show."""
    frame = sys._current_frames().get(thread)
    for _ in range(4):
        if frame is None:
            return False
        if any(place in frame.f_code.co_filename for place in WAITING):
            return True
        frame = frame.f_back
    return False
