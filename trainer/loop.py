"""The loop: step after step, and when to log, validate and save."""

from __future__ import annotations

import time

from tqdm import tqdm

from data.loader import MicroBatch
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import StageStart
from trainer.checkpoint.run_state import restore_shift, run_state
from trainer.checkpoint.trial_save import prove_saving
from trainer.errors import INTERNAL, StopRequested, code_of
from trainer.faults.exit_report import RunStatus
from trainer.faults.requests import EVALUATE, REQUEST_NAMES, SAVE, STOP
from trainer.feed import Feed
from trainer.health.deferred_read import DeferredRead
from trainer.health.loss_monitor import NAME as FAULTS
from trainer.health.loss_monitor import Health, scalars_to_read, split_scalars
from trainer.machine.disk_space import as_save_error
from trainer.machine.json_lines import rows_up_to
from trainer.optim import set_learning_rates
from trainer.records.bookkeeping import Bookkeeping
from trainer.schedule import multiplier
from trainer.scores.best import BestValue
from trainer.screen import Screen
from trainer.setup import PreparedRun
from trainer.state import CheckpointState, MeterState
from trainer.step import StepOptions, train_step
from trainer.training_log import TrainingLog
from trainer.validate import Validation

FAILURE_GRACE_SECONDS = 5.0
"""Seconds that a save under way gets when a run ends by an internal error, or by that of another rank."""


class Loop:
    """One run, or stage of one, from its `first_step` to its last. Between logging, validation and saves no step waits for the
    device, unless an epoch begins or a step had bad numbers.

    Steps are the stage's own: its order, schedule and seeds are those of a run by itself. What the whole run keeps, checkpoints and
    metrics, counts the steps of earlier stages too.
    """

    def __init__(self, prepared: PreparedRun, first_step: int, start: StageStart, best: BestValue, status: RunStatus) -> None:
        """Open the files of the stage, and go on from the state of `start`. Collective."""
        if prepared.trained is None:
            raise ValueError("nothing to train")
        self.prepared, self.first_step, self.best, self.status = prepared, first_step, best, status
        self.stage, self.trained, self.trackers = prepared.stage, prepared.trained, start.trackers
        self.requests, self.tracker = status.requests, status.tracker
        if prepared.model.preference is not None:
            restore_shift(prepared.model.preference.shift, start.state)
        self.log = TrainingLog(prepared, self.trained.optimizer, first_step, start)
        self.validation = Validation(prepared, first_step, start.trackers, self.tracker)
        self.books = Bookkeeping(prepared, first_step)
        self.feed = Feed(prepared, self.books, self.tracker)
        self.health = Health(prepared, start.state["meter"].get("health") if start.state else None)
        self.deferred = DeferredRead(prepared.world.device)
        if prepared.world.is_main:
            rows_up_to(self.stage.run_folder / FAULTS, self.stage.first_step + first_step)
        keep = prepared.config.checkpoint.keep
        self.checkpointer = Checkpointer(self.stage.run_folder, keep, prepared.world, self.tracker.report_progress)

    def run(self) -> None:
        """Train all steps that are left and save the last one. A run that fails leaves a ledger too. Collective."""
        try:
            self._run()
        except BaseException as error:
            # A checkpoint that is nearly there is worth a wait; if a rank has died it will never be complete.
            grace = FAILURE_GRACE_SECONDS if code_of(error) == INTERNAL else self.prepared.config.faults.grace_seconds
            self.checkpointer.drain(grace)
            self.books.close_failed()
            if save_error := as_save_error(error, self.stage.run_folder, self.checkpointer.space):
                raise save_error from error
            raise
        self.books.close()

    def _run(self) -> None:
        begun, total = self.stage.first_step + self.first_step, self.prepared.total_steps
        self.tracker.begin("proof", begun)
        self.checkpointer.space = prove_saving(self.prepared, self.checkpointer, begun, self._state())
        with Screen(self.stage.name, self.first_step, total, speaks=self.prepared.world.is_main) as screen:
            for step in range(self.first_step, total):
                micro_batches, wait = self.feed.next(step)
                self.requests.accepting = True
                self._step(step, micro_batches, wait)
                self.status.step = self.stage.first_step + step + 1
                screen.stepped()
                self._finish_step(step + 1, screen)
        self.checkpointer.wait()

    def _step(self, step: int, micro_batches: list[MicroBatch], wait: float) -> None:
        """Make one step, and look at the numbers of the step before it, which the device has long computed."""
        world, config = self.prepared.world, self.prepared.config
        for micro_batch in micro_batches:
            self.books.quarantine.add(micro_batch.rejected, step)
        set_learning_rates(self.trained.optimizer, multiplier(config.optim, step, self.prepared.total_steps))
        self.tracker.begin("copy", self.stage.first_step + step, [m.batch.sample_ids.tolist() for m in micro_batches])
        batches = [micro_batch.batch.to(world.device) for micro_batch in micro_batches]
        extra = [*self.requests.announce(), self.health.shared_loss()]
        options = StepOptions(config.seed, step, config.optim.clip_norm, extra, self.tracker.mark, self.trained.loss_scale)
        if self._save_is_due(step + 1):
            self.checkpointer.expect()
        result = train_step(self.prepared.wrapped, self.trained.optimizer, batches, world, options)
        self._observe(self.deferred.swap(scalars_to_read(result)))
        self.checkpointer.check()
        self.health.add(step, batches, result)
        self.log.add(batches, result, wait)
        self.books.sample_log.mark_completed(step + 1)

    def _observe(self, values: list[float] | None) -> None:
        """Act on the numbers of an earlier step, the same on every rank. Collective where a step had bad numbers."""
        if values is not None:
            shared, own = split_scalars(values, len(REQUEST_NAMES) + 1)
            self.requests.observe(shared[:-1])
            self.health.observe(shared[-1], *own)

    def _drain(self) -> None:
        """Read the numbers of this step at once: nothing is saved before they were looked at. Collective, host sync."""
        self._observe(self.deferred.flush())
        self.health.drain()

    def _finish_step(self, done: int, screen: Screen) -> None:
        """Log, validate, save and stop where `done` completed steps or a request make it due, in this order on every rank."""
        config, last = self.prepared.config, done == self.prepared.total_steps
        should_save = self.requests.consume(SAVE) or STOP in self.requests.agreed or self._save_is_due(done)
        if should_save:
            self._drain()
            self.requests.consume(SAVE)  # a request that was agreed on while draining is served by this save
        if last:  # before the last step is saved: a start after this one must come to the same end
            self.health.check_updates(done)  # collective, host sync
            self.books.flush(done)
            self.books.check_used()
        reason = self.requests.reason(STOP)
        should_stop = not last and self.requests.consume(STOP)  # a finished stage needs no stop: `train` asks between stages
        should_validate = self._should_validate(done, last, should_stop)
        self.tracker.begin("log", self.stage.first_step + done)
        if last or done == 1 or done % config.log.every == 0:
            self.books.flush(done)
            self.log.write(done, screen)
        started = time.perf_counter()
        if should_validate:
            self.tracker.mark("validation")
            values = self.validation.run(done, self.books.quarantine)
            self.log.file.write(self.stage.first_step + done, values)
            screen.validated(done, values, time.perf_counter() - started)
            self.books.quarantine.check()
            if self.best.observe(values, self.stage.first_step + done) and not should_save:
                should_save = True
                self._drain()
        if should_save:
            self.tracker.mark("save")
            self.books.flush(done)
            self._save(self.stage.first_step + done)
        self.log.meter.started_at += time.perf_counter() - started  # tokens per second are those of training
        if should_stop:
            self.checkpointer.wait()
            name = f"checkpoint-{self.stage.first_step + done}"
            raise StopRequested(f"stopped on request ({reason}); {name} is written, and the same command goes on from there")

    def _save_is_due(self, done: int) -> bool:
        return done == self.prepared.total_steps or done % self.prepared.config.checkpoint.every == 0

    def _should_validate(self, done: int, last: bool, should_stop: bool) -> bool:
        asked, there = self.requests.consume(EVALUATE), self.prepared.data.validation is not None
        if asked and not there and self.prepared.world.is_main:
            tqdm.write("EVAL was asked for, and the run has no [[data.validation]]")
        return there and (asked or ((last or done % self.prepared.config.validation.every == 0) and not should_stop))

    def _save(self, step: int) -> None:
        """Begin to save `step` completed steps of the run. Collective, host sync."""
        prepared, last_step = self.prepared, self.stage.first_step + self.prepared.total_steps
        # Written before the checkpoint: a start after the last one has nothing left to do and would never write them.
        run_files = self.log.file.trainer_state(step, last_step) | self.books.ledger()
        data = prepared.data
        self.checkpointer.save(step, self.trained, self._state(), data.card, data.processor, run_files)

    def _state(self) -> CheckpointState:
        """Return what a checkpoint holds beside tensors. Collective, host sync."""
        meter: MeterState = {**self.log.meter.state(), "health": self.health.state()}
        return run_state(self.prepared, meter, self.best.state, self.trackers.ids)
