"""Gives the loop this rank's micro-batches, step by step: workers, prefetching, and records that are left out from now on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from data.loader import MicroBatch, train_batches
from trainer.faults.phase_tracker import PhaseTracker
from trainer.memory.sample_cost import sample_costs
from trainer.records.quarantine import TRAIN, Quarantine
from trainer.setup import PreparedRun


class LeftOut(Protocol):
    """Bookkeeping that a feed asks about records that are left out; `trainer.records.bookkeeping.Bookkeeping` is one."""

    quarantine: Quarantine

    def flush(self, done: int) -> None:
        """Write the quarantine as it is after `done` completed steps. Collective."""


class Feed:
    """The micro-batches of a stage's steps, in order."""

    def __init__(self, prepared: PreparedRun, books: LeftOut, tracker: PhaseTracker) -> None:
        self.train, self.sampler = prepared.data.training()
        self.prepared, self.books, self.tracker = prepared, books, tracker
        self._left_out: frozenset[int] = frozenset()
        self._batches: Iterator[list[MicroBatch]] | None = None

    def next(self, step: int) -> tuple[list[MicroBatch], float]:
        """Return this rank's micro-batches of `step` and the seconds they were waited for. Collective, as `_open_epoch` is."""
        batches = self._open_epoch(step)
        started = time.perf_counter()
        self.tracker.begin("data", self.prepared.stage.first_step + step)
        return next(batches), time.perf_counter() - started

    def _open_epoch(self, step: int) -> Iterator[list[MicroBatch]]:
        """Begin an epoch without what was quarantined before it, even if it could be read by now: a resumed run leaves it out too.

        Return the batches from `step` on. Collective at the border of an epoch, and a host sync.
        """
        steps_per_epoch = self.sampler.steps_per_epoch
        if self._batches is not None and step % steps_per_epoch:
            return self._batches
        self.tracker.begin("log", self.prepared.stage.first_step + step)
        self.books.flush(step)
        left_out = self.books.quarantine.excluded_at(step, steps_per_epoch)
        if self._batches is None or left_out != self._left_out:
            self._left_out, self._batches = left_out, self._start_workers(step, left_out)
        return self._batches

    def _start_workers(self, first_step: int, left_out: frozenset[int]) -> Iterator[list[MicroBatch]]:
        """Return the batches from `first_step` on, made by new workers that know which records are left out."""
        prepared, config = self.prepared, self.prepared.config
        self.train.exclude(left_out)
        options = prepared.load_options(self.train, TRAIN, self.tracker)
        options = replace(options, pin_memory=prepared.world.device.type == "cuda")
        costs = sample_costs(prepared.model, config.model, self.train) if config.data.packing else None
        steps = range(first_step, prepared.total_steps)
        return train_batches(self.train, self.sampler, prepared.batch_plan, options, steps, costs=costs)
