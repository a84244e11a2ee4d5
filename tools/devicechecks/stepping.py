"""Steps as the loop makes them between two log lines, with made-up batches: what is timed, measured and watched for host syncs."""

from __future__ import annotations

import itertools

from torch import Tensor

from model.batch import Batch
from trainer.faults.requests import Requests
from trainer.health.deferred_read import DeferredRead
from trainer.health.loss_monitor import scalars_to_read
from trainer.metrics import Meter
from trainer.optim import set_learning_rates
from trainer.schedule import multiplier
from trainer.setup import PreparedRun
from trainer.step import StepOptions, train_step


class Stepper:
    """Does what `trainer.loop.Loop` does in a step that is not logged; batches come from page-locked memory on a GPU."""

    def __init__(self, prepared: PreparedRun, batches: list[Batch]) -> None:
        if prepared.trained is None:
            raise ValueError("nothing to train")
        self.prepared, self.optimizer, self.scaling = prepared, prepared.trained.optimizer, prepared.trained.loss_scale
        on_gpu = prepared.world.device.type == "cuda"
        self.batches = itertools.cycle([batch.pin_memory() if on_gpu else batch for batch in batches])
        self.meter, self.deferred, self.requests = (
            Meter(["made up"], prepared.world),
            DeferredRead(prepared.world.device),
            Requests(),
        )
        self.share: Tensor | float = 0.0
        self.done = 0

    def step(self) -> Batch:
        """Train one step of one micro-batch and return the batch, on the host."""
        prepared, config = self.prepared, self.prepared.config
        set_learning_rates(self.optimizer, multiplier(config.optim, self.done, prepared.total_steps))
        batch = next(self.batches)
        here = [batch.to(prepared.world.device)]
        extra = [*self.requests.announce(), self.share]
        options = StepOptions(seed=0, step=self.done, clip_norm=config.optim.clip_norm, extra=extra, scaling=self.scaling)
        result = train_step(prepared.wrapped, self.optimizer, here, prepared.world, options)
        self.deferred.swap(scalars_to_read(result))
        self.share = result.losses.sum()
        self.meter.add(here, result, 0.0)
        self.done += 1
        return batch

    def warm_up(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
