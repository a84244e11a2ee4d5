"""Validation: the token-weighted loss over all ranks and per source, and what other terms of the loss report."""

from __future__ import annotations

from functools import partial

import torch

from data.loader import validation_batches
from data.workers import Reading, describe_sample
from trainer.distributed.parallelize import reshard
from trainer.faults.phase_tracker import PhaseTracker
from trainer.metrics import Ratios, SourceSums, mean_losses, ratio_means
from trainer.records.quarantine import VALIDATION, Quarantine
from trainer.setup import PreparedRun
from trainer.step import ratios_of


def validate(setup: PreparedRun, quarantine: Quarantine, step: int, watch: PhaseTracker | None = None) -> dict[str, float]:
    """Return val/loss, val/<source>/loss and val/<term>_loss over the same records at every call. Collective.

    Bad records go to the quarantine. Every micro-batch is marked in `watch`.
    """
    dataset, world, config, watch = setup.data.validation, setup.world, setup.config, watch or PhaseTracker()
    if dataset is None:
        return {}
    trained, reading = watch.reading, watch.read(Reading(config.data.workers), partial(describe_sample, dataset), VALIDATION)
    sums, ratios = SourceSums(len(dataset.source_names), world.device), Ratios()
    batches = validation_batches(
        dataset,
        setup.batch_plan,
        pad_id=setup.data.pad_id,
        rank=world.rank,
        max_samples=config.validation.max_samples,
        workers=config.data.workers,
        pools=setup.data.validation_pools,
        reading=reading,
    )
    setup.model.eval()
    with torch.no_grad():
        for micro in batches:
            quarantine.add(micro.rejected, step, VALIDATION)
            watch.at(VALIDATION, watch.beat.step, [micro.batch.sample_ids.tolist()])
            batch = micro.batch.to(world.device)
            terms = setup.wrapped(batch)
            sums.add(batch, terms["text"].addends)
            ratios.add(ratios_of(terms))
    watch.reading = trained
    setup.model.train()
    reshard(setup.model)
    quarantine.flush(world)
    losses = mean_losses(world.sum(sums.total()), dataset.source_names, "val")
    return losses | ratio_means(ratios.total(world), "val")
