"""A tracker in a thread of its own: it never stops or slows training, whatever happens to it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tqdm import tqdm

from trainer.trackers.shown_answers import ShownAnswer


class Tracker(Protocol):
    """A program that keeps and draws the numbers of runs. Calls come from a thread of its own, and may take long."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take finite numbers by name, as metrics.jsonl has them, after `step` completed steps of the run."""

    def show(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        """Take answers of the validation after `step` completed steps; the numbers of the same step come later."""

    def close(self) -> None:
        """Deliver what was not delivered yet, and end."""


MOST_WAITING = 1000
"""Lines that wait for a tracker at most; one that is further behind hangs, and is left out."""
SHOWN = 200
"""Characters of an error that are shown."""
Line = tuple[int, Mapping[str, float]]
Task = Callable[[Tracker], None]


class BackgroundTracker:
    """Feeder of one tracker. A tracker that fails or hangs is told once, in one line, and gets nothing from then on."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], earlier: Sequence[Line] = ()) -> None:
        """Open the tracker in the thread: even that may take long. `earlier`: lines of former starts that it gets first."""
        self.name, self.open_tracker, self.earlier = name, open_tracker, earlier
        self.tasks: queue.Queue[Task | None] = queue.Queue(MOST_WAITING)
        self.is_out = False
        self._telling = threading.Lock()
        self.thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass a line on without waiting."""
        self._put(lambda tracker: tracker.log(step, values))

    def show(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        """Pass answers on without waiting."""
        self._put(lambda tracker: tracker.show(step, answers))

    def close(self, seconds: float) -> None:
        """Give the tracker `seconds` to take what waits for it."""
        self._put(None)
        if not self.is_out:
            self.thread.join(seconds)
            if self.thread.is_alive():
                self._leave_out(f"it was not done {seconds:g} s after the run")

    def _put(self, task: Task | None) -> None:
        try:
            if not self.is_out:
                self.tasks.put_nowait(task)
        except queue.Full:
            self._leave_out(f"it hangs: {MOST_WAITING} lines wait for it")

    def _work(self) -> None:
        try:
            tracker = self.open_tracker()
            for step, values in self.earlier:
                tracker.log(step, values)
            self.earlier = ()
            while (task := self.tasks.get()) is not None and not self.is_out:
                task(tracker)
            tracker.close()
        except (Exception, SystemExit) as error:  # whatever other people's code raises
            text = " ".join(str(error).split())
            self._leave_out(f"{type(error).__name__}: {text[:SHOWN]}" if text else type(error).__name__)

    def _leave_out(self, reason: str) -> None:
        with self._telling:
            if self.is_out:
                return
            self.is_out = True
        tqdm.write(f"tracker   {self.name} is left out from here on, training goes on: {reason}")
