"""Validation: the token-weighted loss over all ranks and per source, and what other terms of the loss report."""

from __future__ import annotations

import torch

from data.loader import validation_batches
from trainer.distributed.shards import reshard
from trainer.faults.phase_tracker import PhaseTracker
from trainer.metrics import SourceSums, mean_losses
from trainer.ratios import Ratios, ratio_means, ratios_of
from trainer.records.quarantine import VALIDATION, Quarantine
from trainer.scores.validation_answers import AnswerLog, answer_records, score_rows
from trainer.setup import PreparedRun
from trainer.trackers.open_trackers import Trackers


class Validation:
    """The validations of a stage: the loss over held-out records, and answers to them where measures are asked for."""

    def __init__(self, prepared: PreparedRun, first_step: int, trackers: Trackers, tracker: PhaseTracker) -> None:
        stage = prepared.stage
        self.prepared, self.trackers, self.tracker = prepared, trackers, tracker
        self.answers = AnswerLog(stage.run_folder, stage.first_step + first_step, prepared.world, stage.name)

    def run(self, done: int, quarantine: Quarantine) -> dict[str, float]:
        """Return the values of a validation after `done` steps of the stage; write down the answers they come from. Collective."""
        prepared, metrics, step = self.prepared, self.prepared.config.validation.metrics, self.prepared.stage.first_step + done
        values = validate(prepared, quarantine, done, self.tracker)
        if metrics and prepared.data.validation is not None:
            rows = answer_records(prepared, self.tracker)
            self.answers.write(step, rows)
            self.trackers.show(step, rows, prepared.data.validation)
            values |= score_rows(metrics, rows, prepared.data.validation.source_names, prepared.world)
        return values


def validate(prepared: PreparedRun, quarantine: Quarantine, step: int, tracker: PhaseTracker) -> dict[str, float]:
    """Return val/loss, val/<source>/loss and val/<term>_loss over the same records at every call. Collective.

    Bad records go to the quarantine. Every micro-batch is marked in `tracker`.
    """
    dataset, world, config = prepared.data.validation, prepared.world, prepared.config
    if dataset is None:
        return {}
    trained, options = tracker.reading, prepared.load_options(dataset, VALIDATION, tracker)
    sums, ratios = SourceSums(len(dataset.source_names), world.device), Ratios(dataset.source_names)
    max_samples, pools = config.validation.max_samples, prepared.data.validation_pools
    batches = validation_batches(dataset, prepared.batch_plan, options, max_samples, pools)
    prepared.model.eval()
    with torch.no_grad():
        for micro in batches:
            quarantine.add(micro.rejected, step, VALIDATION)
            tracker.begin(VALIDATION, tracker.beat.step, [micro.batch.sample_ids.tolist()])
            batch = micro.batch.to(world.device)
            terms = prepared.wrapped(batch)
            sums.add(batch, terms["text"].addends)
            ratios.add(ratios_of(terms), batch)
    tracker.reading = trained
    prepared.model.train()
    reshard(prepared.model)
    quarantine.flush(world)
    losses = mean_losses(world.sum(sums.total()), dataset.source_names, "val")
    return losses | ratio_means(ratios.total(world), "val")
