"""Metrics of training steps: added step by step, and every few steps a line in metrics.jsonl, on the screen and in trackers."""

from __future__ import annotations

import torch

from model.batch import Batch
from trainer.checkpoint.resume import StageStart
from trainer.metrics import Meter, MetricsLog
from trainer.optim import PartNorms
from trainer.preference.collapse import CollapseWatch
from trainer.screen import Screen
from trainer.setup import PreparedRun
from trainer.step import StepResult


class TrainingLog:
    """The meter of one stage, and the lines that are made of it."""

    def __init__(self, prepared: PreparedRun, optimizer: torch.optim.Optimizer, first_step: int, start: StageStart) -> None:
        stage, world = prepared.stage, prepared.world
        dataset, _ = prepared.data.training()
        self.stage, self.optimizer = stage, optimizer
        self.meter = Meter(dataset.source_names, world, PartNorms(optimizer, world))
        if start.state:
            self.meter.restore(start.state["meter"])
        self.file = MetricsLog(stage.run_folder, stage.first_step + first_step, world, stage.name, start.trackers)
        self.collapse = None if prepared.model.preference is None else CollapseWatch(dataset, world)

    def add(self, batches: list[Batch], result: StepResult, wait: float) -> None:
        """Add one step. `wait`: seconds for which this rank waited for its data. No host sync."""
        self.meter.add(batches, result, wait)
        if self.collapse:
            self.collapse.add(batches, result)

    def write(self, done: int, screen: Screen) -> None:
        """Write the line that is due after `done` steps of the stage, and begin anew. Collective, host sync."""
        values = self.meter.read()
        rates = {f"train/lr/{group['name'].partition('/')[0]}": group["lr"] for group in self.optimizer.param_groups}
        self.file.write(self.stage.first_step + done, values | rates)
        screen.logged(done, values, max(rates.values()))
        if self.collapse and (text := self.collapse.observe(values)):  # collective where it warns
            screen.say("warning", text)
