"""The quick check of the data beside the building and loading of the model: a thread of rank 0, so that no start waits for it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Self

from model.errors import DataError
from trainer.config import RunConfig
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.records.quick_check import MAX_SECONDS, look
from trainer.records.run_data import RunData

PATIENCE = 2.0
"""Seconds that loading goes on after the check has found that the run cannot start: then all ranks end with it together."""
POLL_SECONDS = 0.1
WAIT_SECONDS = MAX_SECONDS + 5.0
"""Longest wait of a rank that has failed, for the answer of rank 0."""
REASON_KEY = "reason"
_numbers = itertools.count()


class LookBeside:
    """A quick check on rank 0, beside what the `with` does. All of it stays in the memory of rank 0 until `finish`."""

    def __init__(self, data: RunData, config: RunConfig, world: World) -> None:
        self.world = world
        self._lines: list[str] = []
        self._failure: BaseException | None = None
        self._at, self._ended_at = "", 0.0
        self._awaited, self._dropped = threading.Event(), threading.Event()
        number = next(_numbers)  # alike on all ranks, which start the same stages
        self._channel = world.channel(f"look/{number}") if world.size > 1 else None
        self._thread = threading.Thread(target=self._run, args=(data, config), name="quick check", daemon=True)
        if world.is_main:
            self._thread.start()

    def _run(self, data: RunData, config: RunConfig) -> None:
        try:
            self._lines = look(data, config, self._note, self._awaited.is_set)
        except BaseException as error:  # of whatever kind: `finish` raises it in the main thread
            self._failure = error
        self._ended_at = time.monotonic()
        if self._channel is not None:
            self._channel.set(REASON_KEY, str(self._failure) if isinstance(self._failure, DataError) else "")

    def _note(self, at: str) -> None:
        # Not the tracker's own report: the main thread marks its phases meanwhile, and one of the two would be lost.
        self._at = at
        if self._dropped.is_set():
            raise RuntimeError("the start has failed")

    def stop_early(self) -> None:
        """Raise what the check found, on rank 0 alone, where the model is still being loaded PATIENCE seconds later.

        The watchdog ends the other ranks with the same reason, as after any error of one rank.
        """
        if self._ended_at and time.monotonic() - self._ended_at > PATIENCE:
            self._found()

    def precede(self) -> None:
        """Raise what the check has found, which comes before an error of the model, on every rank that has failed to build it.

        Not a collective: a rank may have failed alone.
        """
        self._awaited.set()
        if self.world.is_main:
            self._thread.join(WAIT_SECONDS)
            if isinstance(self._failure, DataError):
                raise self._failure
        elif self._channel is not None:
            with suppress(RuntimeError):  # no answer in time: rank 0 has ended, or is stuck, which the watchdog tells
                self._channel.wait([REASON_KEY], timedelta(seconds=WAIT_SECONDS))
                if reason := self._channel.get(REASON_KEY).decode():
                    raise DataError(reason)

    def finish(self, on_progress: Callable[[str], object]) -> list[str]:
        """Wait for the check, and return its lines for people. Raises its `DataError` on every rank. Collective."""
        self._awaited.set()
        told = ""
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            if told != self._at:  # a check that is stuck on a record makes no progress
                told = self._at
                on_progress(told)
        return on_main_rank(self.world, self._found)

    def _found(self) -> list[str]:
        if self._failure is not None:
            raise self._failure
        return self._lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        """End the thread, whatever it has found: where it still runs, the start has failed for another reason."""
        self._dropped.set()
