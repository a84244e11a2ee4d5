"""Validation loss: token-weighted over all ranks, and per source; and what other terms of the loss show."""

from __future__ import annotations

import torch

from data.loader import validation_batches
from trainer.metrics import Ratios, SourceSums, mean_losses, means
from trainer.parallel import reshard
from trainer.quarantine import VALIDATION, Quarantine
from trainer.setup import Setup
from trainer.step import ratios_of


def validate(setup: Setup, quarantine: Quarantine, step: int) -> dict[str, float]:
    """val/loss, val/<source>/loss and val/<term>_loss over the same records at every call. Collective.

    Bad records go to the quarantine.
    """
    dataset, world, config = setup.data.validation, setup.world, setup.config
    if dataset is None:
        return {}
    sums, ratios = SourceSums(len(dataset.source_names), world.device), Ratios()
    batches = validation_batches(
        dataset,
        setup.batch_plan,
        pad_id=setup.data.pad_id,
        rank=world.rank,
        max_samples=config.validation.max_samples,
        workers=config.data.workers,
        pools=setup.data.validation_pools,
    )
    setup.model.eval()
    with torch.no_grad():
        for micro in batches:
            quarantine.add(micro.rejected, step, VALIDATION)
            batch = micro.batch.to(world.device)
            terms = setup.wrapped(batch)
            sums.add(batch, terms["text"].addends)
            ratios.add(ratios_of(terms))
    setup.model.train()
    reshard(setup.model)
    quarantine.flush(world)
    losses = mean_losses(world.sum(sums.total()), dataset.source_names, "val")
    return losses | means(ratios.total(world), "val")
