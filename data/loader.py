"""Batches in the order of the plan, for one rank, made ahead of time by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.collate import collate
from data.config import DataError
from data.dataset import MultimodalDataset, Rejected
from data.sample import Sample
from data.sampler import Sampler, deal, num_micro_batches
from model.batch import Batch


@dataclass(frozen=True)
class MicroBatch:
    """A batch, and the records that would have been in it. Their places stay empty, so counts never move."""

    batch: Batch
    rejected: tuple[Rejected, ...] = ()

    def pin_memory(self) -> MicroBatch:
        return replace(self, batch=self.batch.pin_memory())


def train_batches(
    dataset: MultimodalDataset,
    sampler: Sampler,
    *,
    pad_id: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    first_step: int,
    last_step: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each optimizer step in [first_step, last_step), steps counted over all epochs.

    Every rank gets equally many per step, blank ones where it has no sample. Order and content do not depend on `workers`.
    Raises `DataError` where the dataset does.
    """

    def shares() -> Iterator[list[np.ndarray]]:
        for step in range(first_step, last_step):
            yield deal(sampler.step(step), sampler.lengths, world_size, micro_batch_size)[rank]

    full = sampler.global_batch_size
    # A step is awaited whole before its first forward: workers must be able to have the next one ready by then.
    ahead = prefetch_factor(num_micro_batches(full, world_size, micro_batch_size), workers)
    batches = _load(dataset, (ids for share in shares() for ids in share), pad_id, workers, pin_memory, ahead)
    short = sampler.samples_per_epoch % full or full
    for step in range(first_step, last_step):
        is_short = (step + 1) % sampler.steps_per_epoch == 0
        yield [next(batches) for _ in range(num_micro_batches(short if is_short else full, world_size, micro_batch_size))]


def prefetch_factor(micro_batches_per_step: int, workers: int) -> int | None:
    """Micro-batches each worker makes ahead of time: together more than a step, so that none waits for the last one."""
    return max(2, -(-micro_batches_per_step // workers) + 1) if workers else None


def validation_batches(
    dataset: MultimodalDataset,
    *,
    pad_id: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    max_samples: int,
    workers: int,
) -> Iterator[MicroBatch]:
    """This rank's share of at most `max_samples` records (0: all), the same ones at every call.

    They are spread evenly over each source, in proportion to its size and at least one of each, even where there are more
    sources than `max_samples`. Every rank gets equally many
    micro-batches, blank ones where it has no sample.
    """
    ids = _spread(np.bincount(dataset.source_ids), max_samples)
    return _load(dataset, iter(deal(ids, dataset.lengths, world_size, micro_batch_size)[rank]), pad_id, workers, False)


def _spread(sizes: np.ndarray, max_samples: int) -> np.ndarray:
    """Distinct ids over all sources, min(max_samples, all) of them or one per source; source s holds sizes[s] consecutive ids."""
    starts = np.cumsum(sizes) - sizes
    least = np.minimum(sizes, 1)
    total = int(sizes.sum())
    wanted = max(min(max_samples or total, total), int(least.sum()))
    # In proportion to size; whom that gives less than one gets one, and the others share what is left.
    shares = least.copy()
    open_ = sizes > 0
    while open_.any():
        rest = wanted - int(least[~open_].sum())
        parts = sizes * rest
        whole = int(sizes[open_].sum())
        small = open_ & (parts < whole)
        if not small.any():
            shares[open_] = parts[open_] // whole
            order = np.flatnonzero(open_)[np.argsort(-(parts[open_] % whole), kind="stable")]
            shares[order[: wanted - int(shares.sum())]] += 1  # to those that rounding cost most
            break
        open_ = open_ & ~small
    return np.concatenate([start + np.arange(n) * size // n for start, n, size in zip(starts, shares, sizes) if n])


class _MicroBatches(Dataset[MicroBatch | DataError]):
    """One micro-batch per list of sample ids. Errors come as values: a worker would wrap them in a traceback."""

    def __init__(self, dataset: MultimodalDataset, pad_id: int) -> None:
        self._dataset, self._pad_id = dataset, pad_id

    def __getitem__(self, ids: np.ndarray) -> MicroBatch | DataError:
        try:
            items = [self._dataset[int(i)] for i in ids]
        except DataError as error:
            return error
        samples = [item for item in items if isinstance(item, Sample)]
        return MicroBatch(collate(samples, self._pad_id), tuple(item for item in items if isinstance(item, Rejected)))


def _load(
    dataset: MultimodalDataset, ids: Iterable[np.ndarray], pad_id: int, workers: int, pin_memory: bool, ahead: int | None = None
) -> Iterator[MicroBatch]:
    loader = DataLoader(
        _MicroBatches(dataset, pad_id),
        batch_size=None,
        sampler=ids,
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # or each start of the loader would draw from the global one
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    """One thread each, and no reaction to signals: a stop request reaches every process of a job, and the main one acts on it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
