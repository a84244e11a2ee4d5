"""Search for the micro-batch of an epoch that needs the most memory, from planned lengths, before any sample is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.dataset import MultimodalDataset
from data.loader import BatchPlan
from data.order.sampler import Sampler
from data.records.record import RecordError
from data.sample import Sample

CANDIDATES = 32
"""Packed steps whose micro-batches are formed in search of the heaviest. Nearly all are filled up to the budget; they differ by
their media."""
_CHUNK_SAMPLES = 1 << 20  # samples whose steps are evaluated at once


@dataclass(frozen=True)
class Heaviest:
    """A micro-batch of one rank. It is rehearsed on all ranks, as any rank may receive one as heavy."""

    step: int  # 0-based, which optimizer step it belongs to
    ids: np.ndarray  # its samples
    num_micro_batches: int  # of that step, on every rank
    cost: float  # tokens of the language model that take as much memory


def find_heaviest(
    sampler: Sampler, plan: BatchPlan, media: np.ndarray, costs: np.ndarray | None, first: int, last: int
) -> Heaviest:
    """Find the heaviest micro-batch over all ranks in steps [first, last), up to the end of the epoch that `first` is in.

    `media` (N,): memory of the media of each sample in their encoders, in tokens; a micro-batch needs its tokens beside that,
    padding included. `costs`: costs by which packing distributes samples. A pure function of its arguments: every rank finds the
    same one.
    """
    epoch = first // sampler.steps_per_epoch
    last = min(last, (epoch + 1) * sampler.steps_per_epoch)
    if plan.is_packed:
        return _heaviest_packed(sampler, plan, media, costs, first, last)
    best = max(_best_of_steps(sampler, plan, media, first, last), key=lambda found: (found[0], -found[1]))
    return _exact(sampler, plan, media, None, best[1])


def _best_of_steps(sampler: Sampler, plan: BatchPlan, media: np.ndarray, first: int, last: int) -> Iterator[tuple[float, int]]:
    """Yield (cost, step) of the heaviest micro-batch of each group of equally long steps."""
    whole = max(1, _CHUNK_SAMPLES // sampler.global_batch_size)
    for start in range(first, last, whole):
        steps = [sampler.step(step) for step in range(start, min(start + whole, last))]
        for size in sorted({len(ids) for ids in steps}):  # the last step of an epoch may be shorter
            here = [start + i for i, ids in enumerate(steps) if len(ids) == size]
            costs = _step_costs(np.stack([ids for ids in steps if len(ids) == size]), sampler.lengths, plan, media)
            yield float(costs.max()), here[int(costs.argmax())]


def _step_costs(ids: np.ndarray, lengths: np.ndarray, plan: BatchPlan, media: np.ndarray) -> np.ndarray:
    """Return (steps,) the memory cost of the heaviest micro-batch of each step; ids (steps, n)."""
    order = np.argsort(-lengths[ids].astype(np.int32), axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    # Positions are dealt, the longest sample first: where micro-batches begin depends only on the number of samples.
    places = np.arange(ids.shape[1])
    dealt = [micro for rank in plan.deal(places, np.zeros_like(places)) for micro in rank if len(micro)]
    spent = np.concatenate([np.zeros((len(ids), 1)), media[ids].cumsum(axis=1, dtype=np.float64)], axis=1)
    costs = [
        len(micro) * lengths[ids[:, micro[0]]].astype(np.float64) + spent[:, micro[-1] + 1] - spent[:, micro[0]] for micro in dealt
    ]
    return np.maximum.reduce(costs)


def _heaviest_packed(
    sampler: Sampler, plan: BatchPlan, media: np.ndarray, costs: np.ndarray | None, first: int, last: int
) -> Heaviest:
    """Return the heaviest micro-batch of the CANDIDATES steps whose micro-batches are the heaviest on average."""
    bound = np.empty(last - first)
    for step in range(first, last):
        ids = sampler.step(step)
        tokens = float(sampler.lengths[ids].sum(dtype=np.int64))
        bins = plan.world_size * max(1, -(-tokens // (plan.world_size * plan.micro_batch_tokens)))
        bound[step - first] = (tokens + float(media[ids].sum(dtype=np.float64))) / bins
    steps = first + np.argsort(-bound, kind="stable")[:CANDIDATES]
    return max((_exact(sampler, plan, media, costs, int(step)) for step in steps), key=lambda found: (found.cost, -found.step))


def _exact(sampler: Sampler, plan: BatchPlan, media: np.ndarray, costs: np.ndarray | None, step: int) -> Heaviest:
    """Return the heaviest micro-batch of one step, distributed over ranks as in training."""
    dealt = plan.deal(sampler.step(step), sampler.lengths, costs)
    found = [(cost_of(micro, sampler.lengths, plan, media), micro) for rank in dealt for micro in rank]
    best = max(range(len(found)), key=lambda i: found[i][0])
    return Heaviest(step, found[best][1], len(dealt[0]), found[best][0])


def cost_of(ids: np.ndarray, lengths: np.ndarray, plan: BatchPlan, media: np.ndarray) -> float:
    """Return the memory cost of one micro-batch, in tokens of the language model."""
    if not len(ids):
        return 0.0
    tokens = lengths[ids].sum(dtype=np.int64) if plan.is_packed else len(ids) * int(lengths[ids].max())
    return float(tokens) + float(media[ids].sum(dtype=np.float64))


def read_batch_samples(dataset: MultimodalDataset, ids: np.ndarray, is_packed: bool) -> list[Sample]:
    """Read the samples of a micro-batch. Bad ones, and ones longer than packing planned, are left out here.

    The step that meets such a sample reports it.
    """
    return [sample for i in ids if (sample := _sample(dataset, int(i), is_packed)) is not None]


def _sample(dataset: MultimodalDataset, i: int, is_packed: bool) -> Sample | None:
    """Read one sample; return None when it is bad, too long, or longer than packing planned."""
    try:
        item = dataset[i]
    except RecordError:
        return None
    if not isinstance(item, Sample) or (is_packed and len(item.input_ids) > dataset.lengths[i]):
        return None
    return item
