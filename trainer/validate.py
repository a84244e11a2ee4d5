"""Validation loss: token-weighted over all ranks, and per source."""

from __future__ import annotations

import torch

from data.loader import validation_batches
from trainer.metrics import SourceSums, mean_losses
from trainer.parallel import reshard
from trainer.quarantine import VALIDATION, Quarantine
from trainer.setup import Setup


def validate(setup: Setup, quarantine: Quarantine, step: int) -> dict[str, float]:
    """val/loss and val/<source>/loss over the same records at every call. Collective. Bad records go to the quarantine."""
    dataset, world, config = setup.data.validation, setup.world, setup.config
    if dataset is None:
        return {}
    sums = SourceSums(len(dataset.source_names), world.device)
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
            sums.add(batch, setup.wrapped(batch)["text"].addends)
    setup.model.train()
    reshard(setup.model)
    quarantine.flush(world)
    return mean_losses(world.sum(sums.total()), dataset.source_names, "val")
