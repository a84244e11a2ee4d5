"""Batches in the planned order, for one rank, made ahead of time by worker processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.batch_transport import pack_for_transport
from data.dataset import MultimodalDataset, Rejected
from data.order.mixing import Pool
from data.order.packing import deal_packed
from data.order.sampler import Sampler, deal, num_micro_batches
from data.order.spread import spread_evenly
from data.preference.collate import join_samples
from data.prefetch import micro_batches_together, planned_bytes, prefetch_factor
from data.sample import Sample
from data.workers import Reading, WorkerError, describe_sample, prepare_worker, unexpected_error
from model.batch import Batch
from model.errors import DataError

_AT_ONCE = 4096
"""Samples without an order of their own that are dealt to ranks and micro-batches at once."""


@dataclass(frozen=True)
class BatchPlan:
    """Plan of how a step becomes micro-batches: so many samples to each, padded, or packed up to so many tokens."""

    world_size: int
    micro_batch_size: int
    micro_batch_tokens: int = 0  # packing; 0 = padding

    @property
    def is_packed(self) -> bool:
        return self.micro_batch_tokens > 0

    def deal(self, ids: np.ndarray, lengths: np.ndarray, costs: np.ndarray | None = None) -> list[list[np.ndarray]]:
        """Share the samples of a step: result[rank][micro-batch], equally many micro-batches for every rank, at least one.

        `lengths` (N,) are planned tokens and `costs` (N,) work, by sample id; only packing uses the costs.
        """
        if self.is_packed:
            return deal_packed(ids, lengths, self.world_size, self.micro_batch_tokens, costs)
        return deal(ids, lengths, self.world_size, self.micro_batch_size)

    def micro_batches_per_step(self, lengths: np.ndarray, global_batch_size: int) -> int:
        """Estimate the number of micro-batches of a full step, assuming mean sample length."""
        if self.is_packed:
            return math.ceil(global_batch_size * float(lengths.mean()) / (self.world_size * self.micro_batch_tokens))
        return num_micro_batches(global_batch_size, self.world_size, self.micro_batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """A batch, and the records that would have been in it. Their places stay empty, so counts never move."""

    batch: Batch
    rejected: tuple[Rejected, ...] = ()
    ends_step: bool = True

    def pin_memory(self) -> MicroBatch:
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class LoadOptions:
    """Settings of a rank for loading its micro-batches; none of them changes what a sample holds."""

    pad_id: int
    rank: int
    workers: int
    pin_memory: bool = False
    reading: Reading | None = None  # shows any thread which samples are being read


def train_batches(
    dataset: MultimodalDataset,
    sampler: Sampler,
    plan: BatchPlan,
    options: LoadOptions,
    steps: range,
    costs: np.ndarray | None = None,
) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of rank `options.rank` for each optimizer step in `steps`, counted over all epochs.

    Every rank gets equally many micro-batches per step, blank ones where it has no sample. Order and content do not depend on
    the workers. When packing, a sample that turns out longer than it was planned is rejected, so that no micro-batch passes its
    budget; which samples are rejected does not depend on the number of ranks. `costs` (N,): work of each sample, by which packing
    balances ranks. Raises `DataError` where the dataset does, `WorkerError` when a worker dies.
    """
    per_step = plan.micro_batches_per_step(sampler.lengths, sampler.global_batch_size)
    together = micro_batches_together(per_step, options.workers)

    def shares() -> Iterator[_Share]:
        for step in steps:
            parts = plan.deal(sampler.step(step), sampler.lengths, costs)[options.rank]
            for start in range(0, len(parts), together):
                yield _Share(parts[start : start + together], start + together >= len(parts))

    planned = sampler.lengths if plan.is_packed else None
    made = _MicroBatches(dataset, plan.is_packed, planned, options)
    pieces = -(-per_step // together)
    ahead = prefetch_factor(
        pieces, options.workers, planned_bytes(dataset) * sampler.global_batch_size / (plan.world_size * pieces)
    )
    step: list[MicroBatch] = []
    for share in _load(made, shares(), options, ahead):
        step += share
        if share[-1].ends_step:
            yield step
            step = []


def validation_batches(
    dataset: MultimodalDataset, plan: BatchPlan, options: LoadOptions, max_samples: int, pools: Sequence[Pool] = ()
) -> Iterator[MicroBatch]:
    """Return the share of rank `options.rank` of the `validation_ids`, the same ones at every call.

    Every rank gets equally many micro-batches, blank ones
    where it has no sample. No record is rejected for its length when packing: without a graph, a micro-batch somewhat over its
    budget does no harm.
    """
    return batches_of(dataset, plan, options, validation_ids(dataset, max_samples, pools))


def batches_of(dataset: MultimodalDataset, plan: BatchPlan, options: LoadOptions, ids: np.ndarray) -> Iterator[MicroBatch]:
    """Return the share of rank `options.rank` of the samples `ids`, with as many micro-batches on every rank."""
    chunks = np.split(ids, range(_AT_ONCE, len(ids), _AT_ONCE))
    shares = (_Share([part], True) for some in chunks for part in plan.deal(some, dataset.lengths)[options.rank])
    made = _MicroBatches(dataset, plan.is_packed, None, options)
    return (micro_batch for share in _load(made, shares, replace(options, pin_memory=False)) for micro_batch in share)


def validation_ids(dataset: MultimodalDataset, max_samples: int, pools: Sequence[Pool] = ()) -> np.ndarray:
    """Return the ids of at most `max_samples` records of `pools`; 0 samples: all of them; no pools: all records.

    They are spread evenly over each source, in proportion to its size and at least one of each, even where there are more sources
    than `max_samples`.
    """
    taken = [pool.ids for pool in pools] or np.split(np.arange(len(dataset)), np.cumsum(np.bincount(dataset.source_ids))[:-1])
    return np.concatenate(taken)[spread_evenly(np.array([len(rows) for rows in taken]), max_samples)]


@dataclass(frozen=True)
class _Share:
    """Sample ids of consecutive micro-batches of one rank."""

    micro_batches: list[np.ndarray]
    ends_step: bool


class _MicroBatches(Dataset[list[MicroBatch] | DataError | WorkerError]):
    """Dataset of the micro-batches of each share. Errors come as values: a worker would wrap them in a traceback."""

    def __init__(self, dataset: MultimodalDataset, is_packed: bool, planned: np.ndarray | None, options: LoadOptions) -> None:
        """Prepare to make micro-batches; `planned` (N,): the tokens that a sample may have at most, by id; None: any number."""
        self._dataset, self._pad_id, self._planned = dataset, options.pad_id, planned
        self.reading = options.reading or Reading(options.workers)
        self._is_packed = is_packed

    def __getitem__(self, share: _Share) -> list[MicroBatch] | DataError | WorkerError:
        last = len(share.micro_batches) - 1 if share.ends_step else None
        try:
            found = [self._micro_batch(ids, micro == last) for micro, ids in enumerate(share.micro_batches)]
            return found if get_worker_info() is None else pack_for_transport(found)
        except DataError as error:
            return error
        except Exception as error:  # as text: an error of a worker would lose its traceback, and not say what was read
            return unexpected_error(error, [describe_sample(self._dataset, i) for i in self.reading.own()])
        finally:
            self.reading.end()

    def _micro_batch(self, ids: np.ndarray, ends_step: bool) -> MicroBatch:
        items = [self._item(int(i)) for i in ids]
        samples = [item for item in items if isinstance(item, Sample)]
        rejected = tuple(item for item in items if isinstance(item, Rejected))
        return MicroBatch(join_samples(samples, self._pad_id, self._is_packed), rejected, ends_step)

    def _item(self, i: int) -> Sample | Rejected:
        """Return sample `i`, rejected if it is longer than it was planned."""
        self.reading.begin(i)
        item = self._dataset[i]
        if self._planned is None or isinstance(item, Rejected) or len(item.input_ids) <= self._planned[i]:
            return item
        reason = (
            f"{len(item.input_ids)} tokens, {self._planned[i]} were planned: the record or its media changed, "
            "or were never measured; run tools.check_data again, and start in another output_dir"
        )
        return self._dataset.reject(i, "length", reason)


def _load(
    made: _MicroBatches, shares: Iterable[_Share], options: LoadOptions, ahead: int | None = None
) -> Iterator[list[MicroBatch]]:
    """Load the micro-batches of each share in order, raising the errors that come as values."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the start says it in the words of the settings
    loader = DataLoader(
        made,
        batch_size=None,
        sampler=shares,
        num_workers=options.workers,
        prefetch_factor=ahead,
        collate_fn=_unchanged,
        pin_memory=options.pin_memory,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # otherwise each start of the loader would draw from the global generator
    )
    batches = iter(loader)
    try:
        while True:
            try:
                item = next(batches)
            except StopIteration:
                return
            except RuntimeError:  # torch does not say how a dead worker died
                made.reading.codes = {worker.pid: worker.exitcode for worker in getattr(batches, "_workers", ())}
                raise
            if isinstance(item, (DataError, WorkerError)):
                raise item
            yield item
    finally:
        # Workers end with their iterator. An error's traceback would keep it alive, and the interpreter would never exit.
        del batches


def _unchanged(item: object) -> object:
    return item
