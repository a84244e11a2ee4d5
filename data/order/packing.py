"""Packing: the samples of one step are shared out over ranks and micro-batches by tokens, so that nothing is padded."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

_HALVINGS = 8  # halvings of the gap between the mean fill and the budget; 1/256 of it is less than one sample
_TOLERANCE = 0.002  # share of the heaviest rank's work: a smaller wait does not matter
_EXCHANGES = 4  # exchanges at most, per rank


def deal_packed(
    ids: np.ndarray, lengths: np.ndarray, world_size: int, budget: int, costs: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Share the samples of one step: result[rank][micro-batch] is an array of sample ids, whose lengths sum to `budget` at most.

    `lengths` (N,) and `costs` (N,) are indexed by sample id; costs: work of a sample in any unit, its tokens if None. Every rank
    gets equally many micro-batches, as few as were found to hold all samples, and no micro-batch is empty as long as there are
    samples for it. Ranks wait for each other at every micro-batch, so the micro-batches of one index are of like work: samples go
    one by one, the costliest first, to the micro-batch with the least work (Graham 1969, longest processing time), or, where that
    passes the budget, into the least even fill that holds them (Coffman, Garey, Johnson 1978, multifit). Ties are broken by id.
    Raises `ValueError` if a single sample is longer than `budget`.
    """
    tokens = lengths[ids].astype(np.int64)
    if len(ids) and int(tokens.max()) > budget:
        raise ValueError(f"sample {int(ids[tokens.argmax()])} has {int(tokens.max())} tokens, the budget is {budget}")
    work = tokens if costs is None else costs[ids].astype(np.float64)
    order = np.lexsort((ids, -tokens, -work))
    length_of, work_of = tokens[order].tolist(), work[order].tolist()
    num_micro = max(1, -(-int(tokens.sum()) // (world_size * budget)))
    while (bins := _packed(length_of, work_of, world_size * num_micro, budget)) is None:
        num_micro += 1
    dealt = _ranked(bins, length_of, work_of, world_size, budget)
    return [[ids[order[places]] for places in rank] for rank in dealt]


def _packed(lengths: list[int], work: list[float], num_bins: int, budget: int) -> list[list[int]] | None:
    """Return the places in `lengths`, sorted by work, of the items of each bin; None if they were not found to fit `num_bins`."""
    if (bins := _balanced(lengths, work, num_bins, budget)) is None and (bins := _tight(lengths, num_bins, budget)) is None:
        return None
    empty = [places for places in bins if not places]
    while empty and (fullest := max(bins, key=len)) and len(fullest) > 1:
        empty.pop().append(fullest.pop())
    return bins


def _balanced(lengths: list[int], work: list[float], num_bins: int, budget: int) -> list[list[int]] | None:
    """Assign each item to the bin with the least work among those that have room for it; None if an item finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    fill = [0] * num_bins
    heap: list[tuple[float, int]] = [(0, place) for place in range(num_bins)]
    for i, length in enumerate(lengths):
        full = []
        while heap and fill[heap[0][1]] + length > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, place = heap[0]
        bins[place].append(i)
        fill[place] += length
        heapq.heapreplace(heap, (load + work[i], place))
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _tight(lengths: list[int], num_bins: int, budget: int) -> list[list[int]] | None:
    """Pack by best fit, the longest item first, at the lowest capacity found to suffice between the mean fill and the budget."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = _best_fit(lengths, order, num_bins, budget)
    low, high = max(-(-sum(lengths) // num_bins), max(lengths)), budget
    for _ in range(_HALVINGS if best is not None else 0):
        middle = (low + high) // 2
        found = _best_fit(lengths, order, num_bins, middle)
        best, low, high = (best, min(middle + 1, high), high) if found is None else (found, low, middle)
    return best


def _best_fit(lengths: list[int], order: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """Assign each item to the fullest bin that has room for it; None if an item finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [(capacity, place) for place in range(num_bins)]
    for i in order:
        at = bisect_left(room, (lengths[i], 0))
        if at == num_bins:
            return None
        free, place = room.pop(at)
        bins[place].append(i)
        insort(room, (free - lengths[i], place))
    return bins


def _ranked(bins: list[list[int]], lengths: list[int], work: list[float], world_size: int, budget: int) -> list[list[list[int]]]:
    """Assign bins of like work to the ranks of one micro-batch, the heaviest first, so that a step that does not fit fails early.

    Every other micro-batch is dealt from the last rank to the first, so that totals balance.
    """
    order = sorted(range(len(bins)), key=lambda place: (-sum(work[i] for i in bins[place]), place))
    dealt: list[list[list[int]]] = [[] for _ in range(world_size)]
    for micro in range(len(bins) // world_size):
        neighbours = [bins[place] for place in order[micro * world_size : (micro + 1) * world_size]]
        _level(neighbours, lengths, work, budget)
        for rank, places in enumerate(neighbours if micro % 2 == 0 else reversed(neighbours)):
            dealt[rank].append(places)
    return dealt


def _level(bins: list[list[int]], lengths: list[int], work: list[float], budget: int) -> None:
    """Exchange items of the heaviest and the lightest bin, in place, as long as that brings the work of the two nearer."""
    loads = [sum(work[i] for i in places) for places in bins]
    for _ in range(_EXCHANGES * len(bins)):
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[heavy] - loads[light]
        if gap <= _TOLERANCE * loads[heavy] or not bins[light]:
            return
        free = [budget - sum(lengths[i] for i in bins[place]) for place in (heavy, light)]
        best, at = gap, None
        for a, i in enumerate(bins[heavy]):
            for b, j in enumerate(bins[light]):
                longer = lengths[i] - lengths[j]
                left = abs(gap - 2 * (work[i] - work[j]))
                if left < best and -free[0] <= longer <= free[1]:
                    best, at = left, (a, b)
        if at is None:
            return
        a, b = at
        moved = work[bins[heavy][a]] - work[bins[light][b]]
        bins[heavy][a], bins[light][b] = bins[light][b], bins[heavy][a]
        loads[heavy] -= moved
        loads[light] += moved
