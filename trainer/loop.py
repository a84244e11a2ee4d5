"""The loop: step after step, and when to log, validate and save."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tqdm import tqdm

from data.loader import MicroBatch
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import digest_of, run_state
from trainer.checkpoint.trial_save import prove_saving
from trainer.errors import INTERNAL, StopRequested, code_of
from trainer.faults.exit_report import RunStatus
from trainer.faults.requests import EVALUATE, REQUEST_NAMES, SAVE, STOP
from trainer.feed import Feed
from trainer.health.deferred_read import DeferredRead
from trainer.health.loss_monitor import Health, forget_after, scalars_to_read, split_scalars
from trainer.machine.disk_space import as_save_error
from trainer.metrics import Meter, MetricsLog
from trainer.optim import set_learning_rates
from trainer.part_norms import PartNorms
from trainer.preference.collapse import CollapseWatch
from trainer.preference.shift_state import restore_shift, shift_state
from trainer.records.bookkeeping import Bookkeeping
from trainer.schedule import multiplier
from trainer.scores.best import BestValue
from trainer.scores.validation_answers import AnswerLog, answer_records, score_rows
from trainer.screen import Screen
from trainer.setup import PreparedRun
from trainer.state import CheckpointState
from trainer.step import StepOptions, train_step
from trainer.trackers.open_trackers import Trackers
from trainer.validate import validate

FAILURE_GRACE_SECONDS = 5.0
"""Seconds that a save under way gets when a run ends by an internal error, or by that of another rank."""


@dataclass(frozen=True)
class LoopStart:
    """Start of a loop: all that it begins with beside the prepared run."""

    state: CheckpointState | None = None  # of the checkpoint that it goes on from; None: nothing was saved before
    trackers: Trackers = field(default_factory=Trackers)


class Loop:
    """One run, or stage of one, from its `first_step` to its last. Between logging, validation and saves no step waits for the
    device, unless an epoch begins or a step had bad numbers.

    Steps are the stage's own: its order, schedule and seeds are those of a run by itself. What the whole run keeps, checkpoints and
    metrics, counts the steps of earlier stages too.
    """

    def __init__(self, prepared: PreparedRun, first_step: int, start: LoopStart, status: RunStatus) -> None:
        config, world, totals = prepared.config, prepared.world, start.state["meter"] if start.state else None
        if prepared.trained is None:
            raise ValueError("nothing to train")
        self.prepared, self.first_step, self.status = prepared, first_step, status
        self.trained, self.optimizer = prepared.trained, prepared.trained.optimizer
        dataset, _ = prepared.data.training()
        stage = self.stage = prepared.stage
        self.meter = Meter(dataset.source_names, world, PartNorms(self.optimizer, world))
        if totals is not None:
            self.meter.restore(totals)
        self.log = MetricsLog(stage.run_folder, stage.first_step + first_step, world, stage.name, start.trackers)
        self.answers = AnswerLog(stage.run_folder, stage.first_step + first_step, world, stage.name)
        self.best = BestValue(config.checkpoint.best, start.state.get("best") if start.state else None)
        self.trackers = start.trackers
        self.collapse = None if prepared.model.preference is None else CollapseWatch(dataset, world)
        if prepared.model.preference is not None:
            restore_shift(prepared.model.preference.shift, start.state)
        self.books = Bookkeeping(prepared, first_step)
        self.lengths = digest_of(prepared.data)
        self.requests, self.tracker, self.deferred = status.requests, status.tracker, DeferredRead(world.device)
        self.feed = Feed(prepared, self.books, self.tracker)
        self.health = Health(prepared, totals["health"] if totals and "health" in totals else None)
        if world.is_main:
            forget_after(stage.run_folder, stage.first_step + first_step)
        self.checkpointer = Checkpointer(stage.run_folder, config.checkpoint.keep, world, self.tracker.report_progress)

    def run(self) -> None:
        """Train all steps that are left and save the last one. A run that fails leaves a ledger too. Collective."""
        try:
            self._run()
        except BaseException as error:
            # A checkpoint that is nearly there is worth a wait; if a rank has died it will never be complete.
            self.checkpointer.drain(
                FAILURE_GRACE_SECONDS if code_of(error) == INTERNAL else self.prepared.config.faults.grace_seconds
            )
            self.books.close_failed()
            if save_error := as_save_error(error, self.stage.run_folder, self.checkpointer.space):
                raise save_error from error
            raise
        self.books.close()

    def _run(self) -> None:
        self.tracker.begin("proof", self.stage.first_step + self.first_step)
        self.checkpointer.space = prove_saving(
            self.prepared, self.checkpointer, self.stage.first_step + self.first_step, self._state()
        )
        total = self.prepared.total_steps
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
        prepared, config = self.prepared, self.prepared.config
        for micro_batch in micro_batches:
            self.books.quarantine.add(micro_batch.rejected, step)
        set_learning_rates(self.optimizer, multiplier(config.optim, step, prepared.total_steps))
        self.tracker.begin("copy", self.stage.first_step + step, [m.batch.sample_ids.tolist() for m in micro_batches])
        batches = [micro_batch.batch.to(prepared.world.device) for micro_batch in micro_batches]
        result = train_step(
            prepared.wrapped,
            self.optimizer,
            batches,
            prepared.world,
            StepOptions(
                seed=config.seed,
                step=step,
                clip_norm=config.optim.clip_norm,
                extra=[*self.requests.announce(), self.health.shared_loss()],
                mark=self.tracker.mark,
                scaling=self.trained.loss_scale,
            ),
        )
        self._observe(self.deferred.swap(scalars_to_read(result)))
        self.checkpointer.check()
        self.health.add(step, batches, result)
        self.meter.add(batches, result, wait)
        if self.collapse:
            self.collapse.add(batches, result)
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
        should_save = self.requests.consume(SAVE) or STOP in self.requests.agreed or last or done % config.checkpoint.every == 0
        if should_save:
            self._drain()
            self.requests.consume(SAVE)  # a request that was agreed on while draining is served by this save
        if last:
            self._check_trained(done)
        reason = self.requests.reason(STOP)
        should_stop = not last and self.requests.consume(STOP)  # a finished stage needs no stop: `train` asks between stages
        should_validate = self._should_validate(done, last, should_stop)
        self.tracker.begin("log", self.stage.first_step + done)
        if last or done == 1 or done % config.log.every == 0:
            self._log(done, screen)
        started = time.perf_counter()
        if should_validate:
            self.tracker.mark("validation")
            values = self._validate(done)
            screen.validated(done, values, time.perf_counter() - started)
            self.books.quarantine.check()
            if self.best.observe(values, self.stage.first_step + done) and not should_save:
                should_save = True
                self._drain()
        if should_save:
            self.tracker.mark("save")
            self.books.flush(done)
            self._save(done)
        self.meter.started_at += time.perf_counter() - started  # tokens per second are those of training
        if should_stop:
            self.checkpointer.wait()
            name = f"checkpoint-{self.stage.first_step + done}"
            raise StopRequested(f"stopped on request ({reason}); {name} is written, and the same command goes on from there")

    def _check_trained(self, done: int) -> None:
        """Check that something was learned, before the last step is saved: a start after this one must come to the same end.

        Collective, host sync.
        """
        self.health.check_updates(done)
        self.books.flush(done)
        self.books.check_used()

    def _should_validate(self, done: int, last: bool, should_stop: bool) -> bool:
        asked, there = self.requests.consume(EVALUATE), self.prepared.data.validation is not None
        if asked and not there and self.prepared.world.is_main:
            tqdm.write("EVAL was asked for, and the run has no [[data.validation]]")
        return there and (asked or ((last or done % self.prepared.config.validation.every == 0) and not should_stop))

    def _validate(self, done: int) -> dict[str, float]:
        """Return the values of a validation, written down with the answers that were generated for them. Collective."""
        prepared, metrics, step = self.prepared, self.prepared.config.validation.metrics, self.stage.first_step + done
        values = validate(prepared, self.books.quarantine, done, self.tracker)
        if metrics and prepared.data.validation is not None:
            rows = answer_records(prepared, self.tracker)
            self.answers.write(step, rows)
            self.trackers.show(step, rows, prepared.data.validation)
            values |= score_rows(metrics, rows, prepared.data.validation.source_names, prepared.world)
        self.log.write(step, values)
        return values

    def _log(self, done: int, screen: Screen) -> None:
        self.books.flush(done)
        values = self.meter.read()
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            rates[f"train/lr/{group['name'].partition('/')[0]}"] = group["lr"]
        self.log.write(self.stage.first_step + done, values | rates)
        screen.logged(done, values, max(rates.values()))
        if self.collapse and (text := self.collapse.observe(values)):  # collective where it warns
            screen.say("warning", text)

    def _save(self, done: int) -> None:
        prepared, first_step = self.prepared, self.stage.first_step
        # Written before the checkpoint: a start after the last one has nothing left to do and would never write them.
        run_files = self.log.trainer_state(first_step + done, first_step + prepared.total_steps) | self.books.ledger()
        self.checkpointer.save(
            first_step + done,
            self.trained,
            self._state(),
            prepared.data.card,
            prepared.data.processor,
            run_files,
        )

    def _state(self) -> CheckpointState:
        """Return the state of the loop that a checkpoint holds. Collective, host sync."""
        state: CheckpointState = {"meter": {**self.meter.state(), "health": self.health.state()}}
        if self.trained.loss_scale:
            state["loss_scale"] = self.trained.loss_scale.state()
        if (tuning := self.prepared.model.preference) is not None and tuning.shift.is_used:
            state["rewards"] = shift_state(tuning.shift, self.prepared.world)
        if self.best.state is not None:
            state["best"] = self.best.state
        if self.trackers.ids:
            state["trackers"] = self.trackers.ids
        return {**run_state(self.stage, self.lengths, self.prepared.world.size), **state}
