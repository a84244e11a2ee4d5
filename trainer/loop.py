"""The loop: step after step, and when to log, validate and save."""

from __future__ import annotations

import time

from tqdm import tqdm

from data.loader import MicroBatch
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import digest_of, run_state
from trainer.checkpoint.trial_save import prove_saving
from trainer.errors import INTERNAL, StopRequested, code_of
from trainer.faults.exit_report import RunStatus
from trainer.faults.requests import EVALUATE, SAVE, STOP, WISHES
from trainer.feed import Feed
from trainer.health.deferred_read import DeferredRead
from trainer.health.loss_monitor import Health, forget_after, scalars_to_read, split_scalars
from trainer.machine.disk_space import as_save_error
from trainer.metrics import Meter, MetricsLog
from trainer.optim import set_learning_rates
from trainer.records.bookkeeping import Bookkeeping
from trainer.schedule import multiplier
from trainer.setup import PreparedRun
from trainer.state import CheckpointState, MeterState
from trainer.step import train_step
from trainer.validate import validate

PEERS = 5.0
"""Seconds that a save under way gets when a run ends by an error of its own, or by that of another rank."""


class Loop:
    """One run, or stage of one, from its `first_step` to its last. Nothing between two due dates waits for the device.

    Steps are the stage's own: its order, schedule and seeds are those of a run by itself. What the whole run keeps, checkpoints and
    metrics, counts the steps of earlier stages too.
    """

    def __init__(self, setup: PreparedRun, first_step: int, totals: MeterState | None, progress: RunStatus) -> None:
        config, world = setup.config, setup.world
        if setup.trained is None:
            raise ValueError("nothing to train")
        self.setup, self.first_step, self.progress = setup, first_step, progress
        self.trained, self.optimizer = setup.trained, setup.trained.optimizer
        dataset, _ = setup.data.training()
        place = self.place = setup.place
        self.meter = Meter(dataset.source_names, world)
        if totals is not None:
            self.meter.restore(totals)
        self.log = MetricsLog(place.run_folder, place.first_step + first_step, world, place.name)
        self.accounts = Bookkeeping(setup, first_step)
        self.lengths = digest_of(setup.data)
        self.steering, self.watch, self.later = progress.steering, progress.watch, DeferredRead(world.device)
        self.feed = Feed(setup, self.accounts, self.watch)
        self.health = Health(setup, totals["health"] if totals and "health" in totals else None)
        if world.is_main:
            forget_after(place.run_folder, place.first_step + first_step)
        self.checkpointer = Checkpointer(place.run_folder, config.checkpoint.keep, world, self.watch.alive)

    def run(self) -> None:
        """Train all steps that are left and save the last one. A run that fails leaves a ledger too. Collective."""
        try:
            self._run()
        except BaseException as error:
            # A checkpoint that is nearly there is worth a wait; if a rank has died it will never be complete.
            self.checkpointer.settle(PEERS if code_of(error) == INTERNAL else self.setup.config.faults.grace_seconds)
            self.accounts.leave()
            if told := as_save_error(error, self.place.run_folder, self.checkpointer.room):
                raise told from error
            raise
        self.accounts.close()

    def _run(self) -> None:
        self.watch.at("proof", self.place.first_step + self.first_step)
        self.checkpointer.room = prove_saving(self.setup, self.checkpointer, self.place.first_step + self.first_step, self._state())
        total = self.setup.total_steps
        bar = tqdm(
            desc=self.place.name or None,
            total=total,
            initial=self.first_step,
            unit="step",
            disable=not self.setup.world.is_main,
            dynamic_ncols=True,
        )
        with bar:
            for step in range(self.first_step, total):
                micro_batches, wait = self.feed.next(step)
                self.steering.heeded = True
                self._step(step, micro_batches, wait)
                self.progress.step = self.place.first_step + step + 1
                bar.update()
                self._due(step + 1, bar)
        self.checkpointer.wait()

    def _step(self, step: int, micro_batches: list[MicroBatch], wait: float) -> None:
        setup, config = self.setup, self.setup.config
        for micro_batch in micro_batches:
            self.accounts.quarantine.add(micro_batch.rejected, step)
        set_learning_rates(self.optimizer, multiplier(config.optim, step, setup.total_steps))
        self.watch.at("copy", self.place.first_step + step, [m.batch.sample_ids.tolist() for m in micro_batches])
        batches = [micro_batch.batch.to(setup.world.device) for micro_batch in micro_batches]
        result = train_step(
            setup.wrapped,
            self.optimizer,
            batches,
            setup.world,
            seed=config.seed,
            step=step,
            clip_norm=config.optim.clip_norm,
            told=[*self.steering.told(), self.health.told()],
            mark=self.watch.mark,
        )
        self._hear(self.later.push(scalars_to_read(result)))
        self.checkpointer.check()
        self.health.add(step, batches, result)
        self.meter.add(batches, result, wait)
        self.accounts.step_log.done(step + 1)

    def _hear(self, values: list[float] | None) -> None:
        """Act on the numbers of the step before this one: the same on every rank, and no wait for the device."""
        if values is not None:
            notes, own = split_scalars(values, len(WISHES) + 1)
            self.steering.hear(notes[:-1])
            self.health.hear(notes[-1], *own)

    def _settle(self) -> None:
        """Read the numbers of this step at once: nothing is saved before they were looked at. Collective, host sync."""
        self._hear(self.later.pop())
        self.health.settle()

    def _due(self, done: int, bar: tqdm) -> None:
        """Log, validate, save and stop where `done` completed steps make it due, in this order on every rank."""
        config, last = self.setup.config, done == self.setup.total_steps
        saves = self.steering.take(SAVE) or STOP in self.steering.agreed or last or done % config.checkpoint.every == 0
        if saves:
            self._settle()
            self.steering.take(SAVE)  # asked for in this very step: this is it
        if last:
            self._check_learned(done)
        reason = self.steering.reason(STOP)
        stops = not last and self.steering.take(STOP)  # what is over need not be stopped; between stages it is asked again
        evaluates = self._evaluates(done, last, stops)
        self.watch.at("log", self.place.first_step + done)
        if last or done == 1 or done % config.log.every == 0:
            self._log(done, bar)
        started = time.perf_counter()
        if evaluates:
            self.watch.mark("validation")
            self.log.write(self.place.first_step + done, validate(self.setup, self.accounts.quarantine, done, self.watch))
            self.accounts.quarantine.check()
        if saves:
            self.watch.mark("save")
            self.accounts.flush(done)
            self._save(done)
        self.meter.since += time.perf_counter() - started  # tokens per second are those of training
        if stops:
            self.checkpointer.wait()
            name = f"checkpoint-{self.place.first_step + done}"
            raise StopRequested(f"stopped on request ({reason}); {name} is written, and the same command goes on from there")

    def _check_learned(self, done: int) -> None:
        """Check that something was learned, before the last step is saved: a start after this one must come to the same end.

        Collective, host sync.
        """
        self.health.check_updates(done)
        self.accounts.flush(done)
        self.accounts.check_used()

    def _evaluates(self, done: int, last: bool, stops: bool) -> bool:
        asked, there = self.steering.take(EVALUATE), self.setup.data.validation is not None
        if asked and not there and self.setup.world.is_main:
            tqdm.write("EVAL was asked for, and the run has no [[data.validation]]")
        return there and (asked or ((last or done % self.setup.config.validation.every == 0) and not stops))

    def _log(self, done: int, bar: tqdm) -> None:
        self.accounts.flush(done)
        values = self.meter.read()
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            rates[f"train/lr/{group['name'].partition('/')[0]}"] = group["lr"]
        self.log.write(self.place.first_step + done, values | rates)
        bar.set_postfix_str(
            f"loss {values['train/loss']:.4f}, lr {max(rates.values()):.2e}, {values['perf/tokens_per_second']:,.0f} tokens/s"
        )

    def _save(self, done: int) -> None:
        setup, first_step = self.setup, self.place.first_step
        # Before the checkpoint: after the last one a start has nothing left to do, and would never write them.
        before = self.log.trainer_state(first_step + done, first_step + setup.total_steps) | self.accounts.ledger()
        self.checkpointer.save(
            first_step + done,
            self.trained,
            self._state(),
            setup.data.card,
            setup.data.processor,
            before,
        )

    def _state(self) -> CheckpointState:
        """Return what a checkpoint holds beside tensors. Collective, host sync."""
        return {**run_state(self.place, self.lengths), "meter": {**self.meter.state(), "health": self.health.state()}}
