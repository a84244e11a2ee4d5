"""The data order: which samples make up each optimizer step, and how the ranks share a step.

Both are pure functions of (seed, epoch, position, global batch, planned lengths). Neither the number of ranks nor the number
of workers enters the order, so a run may be resumed with others and sees the same samples in the same steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

ORDERS = ("modality_length", "length", "random", "sequential")
WINDOW = 128
"""Optimizer steps that are sorted by length together. A step then spans 1/128 of its window's lengths, which leaves about 1 % of
padding on a LLaVA-like mix (`tools.bench_sampler`; 32 leave 3 %), while a run of thousands of steps still has dozens of windows,
drawn anew each epoch."""


@dataclass(frozen=True)
class Sampler:
    """The order of all samples, epoch after epoch; `global_batch_size` samples make one optimizer step.

    modality_length: a step holds one modality, of similar lengths (Liu et al. 2023, LLaVA); what is left of each modality after
    whole steps, a random part of it, forms mixed steps of similar lengths. length: the same without regard to modality.
    random: a permutation. sequential: as in the files. The last step of an epoch is short when the samples do not divide.
    """

    lengths: np.ndarray  # (N,) planned tokens of each sample
    modalities: np.ndarray  # (N,) small integers, equal for samples of one kind
    global_batch_size: int
    seed: int
    order: str
    _last: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order = {self.order!r} is none of {', '.join(ORDERS)}")
        if self.global_batch_size < 1:
            raise ValueError(f"global_batch_size = {self.global_batch_size} is not positive")
        if len(self.lengths) == 0 or len(self.lengths) != len(self.modalities):
            raise ValueError(f"{len(self.lengths)} lengths and {len(self.modalities)} modalities: need one of each per sample")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.global_batch_size)

    def step(self, step: int) -> np.ndarray:
        """Sample ids (n,) of 0-based optimizer step `step` over all epochs; n = global_batch_size but for the last of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._last:
            self._last.clear()
            self._last[epoch] = self.epoch(epoch)
        start = position * self.global_batch_size
        return self._last[epoch][start : start + self.global_batch_size]

    def epoch(self, epoch: int) -> np.ndarray:
        """All sample ids (N,) in the order of epoch `epoch`: step s of it is [s * G : (s + 1) * G]."""
        if self.order == "sequential":
            return np.arange(len(self.lengths))
        generator = _generator(self.seed, epoch)
        if self.order == "random":
            return _shuffled(np.arange(len(self.lengths)), generator)
        groups = self.modalities if self.order == "modality_length" else np.zeros(len(self.lengths), dtype=np.int8)
        return self._grouped(groups, generator)

    def _grouped(self, groups: np.ndarray, generator: torch.Generator) -> np.ndarray:
        size, steps, rest = self.global_batch_size, [], []
        for group in np.unique(groups):
            ids = _shuffled(np.flatnonzero(groups == group), generator)
            whole = len(ids) - len(ids) % size
            steps.append(self._by_length(ids[:whole]))
            rest.append(ids[whole:])
        # Shuffled before it is cut, so that the short last step is a fair draw from what is left and not its longest or shortest.
        left = _shuffled(np.concatenate(rest), generator)
        whole = len(left) - len(left) % size
        steps.append(self._by_length(left[:whole]))
        full = np.concatenate(steps)
        return np.concatenate([full[_shuffled(np.arange(len(full)), generator)].reshape(-1), left[whole:]])

    def _by_length(self, ids: np.ndarray) -> np.ndarray:
        """Whole steps (M, G) of similar lengths out of shuffled `ids` (M * G,): sorted within windows of equal size."""
        steps = len(ids) // self.global_batch_size
        windows = max(-(-steps // WINDOW), min(2, steps))  # two at least, or a small set is cut the same way each epoch
        window = np.arange(len(ids)) // self.global_batch_size * windows // max(steps, 1)
        key = (window << 32) + self.lengths[ids].astype(np.int64)
        return ids[np.argsort(key, kind="stable")].reshape(-1, self.global_batch_size)


def deal(ids: np.ndarray, lengths: np.ndarray, world_size: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """Share the samples of one step: result[rank][micro-batch] is an array of sample ids, possibly empty.

    `lengths` (N,) is indexed by sample id. Every rank gets equally many micro-batches, as few as fit, and as many samples as any
    other, give or take one. Sorted from long to short, the samples of one micro-batch over all ranks are neighbours, so that
    nobody waits; every other micro-batch is dealt from the last rank to the first, so that totals balance.
    """
    ids = ids[np.argsort(-lengths[ids].astype(np.int64), kind="stable")]
    share, extra = divmod(len(ids), world_size)
    num_micro = num_micro_batches(len(ids), world_size, micro_batch_size)
    base, larger = divmod(share, num_micro)
    dealt: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    start = 0
    for micro in range(num_micro):
        # Larger micro-batches come last, where samples are shorter; within one, whoever holds a sample more holds shorter ones.
        sizes = np.full(world_size, base + (micro >= num_micro - larger))
        if micro == num_micro - larger - 1:
            sizes[world_size - extra :] += 1
        bounds = start + np.concatenate([[0], np.cumsum(sizes)])
        for place in range(world_size):
            rank = place if micro % 2 == 0 else world_size - 1 - place
            dealt[rank].append(ids[bounds[place] : bounds[place + 1]])
        start = bounds[-1]
    return dealt


def num_micro_batches(num_samples: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-batches that every rank runs for a step of `num_samples`; at least one, so that all take part."""
    return max(1, -(-num_samples // (world_size * micro_batch_size)))


def _generator(seed: int, epoch: int) -> torch.Generator:
    """One generator for all draws of an epoch. Hashed, because seed + epoch would give seed 1 the second epoch of seed 0."""
    digest = hashlib.sha256(f"data order {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _shuffled(ids: np.ndarray, generator: torch.Generator) -> np.ndarray:
    return ids[torch.randperm(len(ids), generator=generator).numpy()]
