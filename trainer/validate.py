"""Validation: the token-weighted loss over all ranks and per source, and what other terms of the loss report."""

from __future__ import annotations

from functools import partial

import torch

from data.loader import LoadOptions, validation_batches
from data.workers import Reading, describe_sample
from trainer.distributed.shards import reshard
from trainer.faults.phase_tracker import PhaseTracker
from trainer.metrics import SourceSums, mean_losses
from trainer.ratios import Ratios, ratio_means
from trainer.records.quarantine import VALIDATION, Quarantine
from trainer.setup import PreparedRun
from trainer.step import ratios_of


def validate(prepared: PreparedRun, quarantine: Quarantine, step: int, tracker: PhaseTracker | None = None) -> dict[str, float]:
    """Return val/loss, val/<source>/loss and val/<term>_loss over the same records at every call. Collective.

    Bad records go to the quarantine. Every micro-batch is marked in `tracker`.
    """
    dataset, world, config, tracker = prepared.data.validation, prepared.world, prepared.config, tracker or PhaseTracker()
    if dataset is None:
        return {}
    trained, reading = (
        tracker.reading,
        tracker.watch_workers(Reading(config.data.workers), partial(describe_sample, dataset), VALIDATION),
    )
    sums, ratios = SourceSums(len(dataset.source_names), world.device), Ratios(dataset.source_names)
    options = LoadOptions(pad_id=prepared.data.pad_id, rank=world.rank, workers=config.data.workers, reading=reading)
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
