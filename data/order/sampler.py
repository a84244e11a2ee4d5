"""Data order: which samples make up each optimizer step, and how the ranks share a step.

Both are pure functions of (seed, epoch, position, global batch, planned lengths, pools). Neither the number of ranks nor the number
of workers enters the order, so a run may be resumed with other numbers and sees the same samples in the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from data.order.mixing import Pool, generator_of, permutation, smallest_arange

ORDERS = ("modality_length", "length", "random", "sequential")
WINDOW = 128
"""Optimizer steps that are sorted by length together. A step then spans 1/128 of its window's lengths, which leaves about 1 % of
padding on a LLaVA-like mix (`tools.bench_sampler`; 32 leave 3 %), while a run of thousands of steps still has dozens of windows,
drawn anew each epoch."""


@dataclass(frozen=True)
class Sampler:
    """Order of all samples, epoch after epoch; `global_batch_size` samples make one optimizer step.

    modality_length: a step holds one modality, of similar lengths (Liu et al. 2023, LLaVA); the samples of each modality that are
    left after its whole steps, a random part of it, form mixed steps of similar lengths. length: the same without regard to
    modality. random: a permutation. sequential: as in the files. The last step of an epoch is short when the samples do not divide.
    With `pools`, an epoch holds what each pool draws for it, so a sample may occur in it several times or not at all.
    """

    lengths: np.ndarray  # (N,) planned tokens of each sample
    modalities: np.ndarray  # (N,) small integers, equal for samples of one kind
    global_batch_size: int
    seed: int
    order: str
    pools: tuple[Pool, ...] = ()  # empty: every sample once per epoch
    _last: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order = {self.order!r} is none of {', '.join(ORDERS)}")
        if self.global_batch_size < 1:
            raise ValueError(f"global_batch_size = {self.global_batch_size} is not positive")
        if len(self.lengths) == 0 or len(self.lengths) != len(self.modalities):
            raise ValueError(f"{len(self.lengths)} lengths and {len(self.modalities)} modalities: need one of each per sample")

    @property
    def samples_per_epoch(self) -> int:
        """Return the number of samples of an epoch, the same in every epoch."""
        return sum(pool.places for pool in self.pools) if self.pools else len(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.global_batch_size)

    def step(self, step: int) -> np.ndarray:
        """Return the sample ids (n,) of optimizer step `step`, 0-based over all epochs.

        n is global_batch_size, except for the last step of an epoch.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return self._cached(epoch)[start : start + self.global_batch_size]

    def before(self, step: int) -> tuple[int, np.ndarray]:
        """Return the number of whole epochs before `step`, and the sample ids that come before it in its own epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        ids = self._cached(epoch)[: position * self.global_batch_size] if position else np.zeros(0, dtype=np.int64)
        return epoch, ids

    def _cached(self, epoch: int) -> np.ndarray:
        if epoch not in self._last:
            # Two epochs are kept: while batches of the next one are made ahead, other callers still ask for this one.
            for old in sorted(self._last, key=lambda e: abs(e - epoch))[1:]:
                del self._last[old]
            self._last[epoch] = self.epoch(epoch)
        return self._last[epoch]

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the sample ids (samples_per_epoch,) in the order of epoch `epoch`: step s of it is [s * G : (s + 1) * G]."""
        drawn = np.concatenate([pool.draw(epoch) for pool in self.pools]) if self.pools else smallest_arange(len(self.lengths))
        if self.order == "sequential":
            return drawn
        generator = generator_of(f"data order {self.seed} {epoch}")
        if self.order == "random":
            return _shuffled(drawn, generator)
        groups = self.modalities[drawn] if self.order == "modality_length" else np.zeros(len(drawn), dtype=np.int8)
        return self._grouped(drawn, groups, generator)

    def _grouped(self, drawn: np.ndarray, groups: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Return the ids as steps of one group each and mixed steps of what is left, in random order, then the short step."""
        size, steps, rest = self.global_batch_size, [], []
        for group in np.unique(groups):
            ids = _shuffled(drawn[groups == group], generator)
            whole = len(ids) - len(ids) % size
            steps.append(self._by_length(ids[:whole]))
            rest.append(ids[whole:])
        # Shuffled before they are cut, so that the short last step is a fair draw and not the longest or shortest samples.
        left = _shuffled(np.concatenate(rest), generator)
        whole = len(left) - len(left) % size
        steps.append(self._by_length(left[:whole]))
        return self._in_random_order(steps, left[whole:], generator)

    def _in_random_order(self, steps: list[np.ndarray], short: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Arrange all whole steps in random order, then the `short` one.

        Each step is written to its final place, because copies of an epoch take time.
        """
        num_steps = sum(map(len, steps))
        places = np.argsort(_shuffled(np.arange(num_steps), generator))
        order = np.empty(num_steps * self.global_batch_size + len(short), dtype=short.dtype)
        rows = order[: num_steps * self.global_batch_size].reshape(-1, self.global_batch_size)
        for group, where in zip(steps, np.split(places, np.cumsum([len(group) for group in steps])[:-1])):
            rows[where] = group
        order[rows.size :] = short
        return order

    def _by_length(self, ids: np.ndarray) -> np.ndarray:
        """Arrange shuffled `ids` (M * G,), in place, into whole steps (M, G) of similar lengths: sorted within equal windows."""
        steps = len(ids) // self.global_batch_size
        windows = max(-(-steps // WINDOW), min(2, steps))  # two at least, or a small set is cut the same way each epoch
        places = np.arange(-(-steps // max(windows, 1)) * self.global_batch_size)
        for window in range(windows):
            start, stop = (-(-w * steps // windows) * self.global_batch_size for w in (window, window + 1))
            # Length and place in one number: a plain sort is several times faster than a stable argsort, and gives the same.
            keys = (self.lengths[ids[start:stop]].astype(np.int64) << 32) + places[: stop - start]
            keys.sort()
            ids[start:stop] = ids[start:stop][keys & 0xFFFFFFFF]
        return ids.reshape(-1, self.global_batch_size)


def deal(ids: np.ndarray, lengths: np.ndarray, world_size: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """Share the samples of one step: result[rank][micro-batch] is an array of sample ids, possibly empty.

    `lengths` (N,) is indexed by sample id. Every rank gets equally many micro-batches, as few as fit, and as many samples as any
    other, give or take one. Sorted from long to short, the samples of one micro-batch over all ranks are neighbours, so that no
    rank waits; every other micro-batch is dealt from the last rank to the first, so that totals balance.
    """
    ids = ids[np.argsort(-lengths[ids].astype(np.int64), kind="stable")]
    share, extra = divmod(len(ids), world_size)
    num_micro = num_micro_batches(len(ids), world_size, micro_batch_size)
    base, larger = divmod(share, num_micro)
    dealt: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    start = 0
    for micro in range(num_micro):
        # Larger micro-batches come last, where samples are shorter; within one, a rank with one more sample holds shorter ones.
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
    """Return how many micro-batches every rank runs for a step of `num_samples`; at least one, so that all ranks take part."""
    return max(1, -(-num_samples // (world_size * micro_batch_size)))


def _shuffled(ids: np.ndarray, generator: torch.Generator) -> np.ndarray:
    return ids[permutation(len(ids), generator)]
