"""Measure how much of the work is useful: our data order, packed and padded, beside a random one and LLaVA's.

The lengths are like those of LLaVA's 665k mix.

Useful is the sum of true lengths. A rank computes a micro-batch's tokens if it is packed, else its rows times the longest of
them. "Slowest rank" counts every rank as busy as the busiest of the same micro-step, for which all ranks wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from data.loader import BatchPlan
from data.order.sampler import Sampler
from tools.cli import command_parser

NUM_IMAGE, NUM_TEXT = 624_000, 41_000
IMAGE_TOKENS, MAX_LENGTH = 576, 2048

MicroStep = list[np.ndarray]  # sample ids of one micro-batch per rank
Plan = Callable[[np.ndarray, np.ndarray, int, int], list[MicroStep]]


@dataclass(frozen=True)
class Efficiency:
    """Useful tokens per slot that is computed, and per slot that all ranks spend when they wait for the slowest."""

    per_rank: float
    slowest_rank: float


def llava_like_mix(scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return planned lengths and modalities (1 image, 0 text) of a synthetic mix, the same at every call.

    Image samples: 576 image tokens and a log-normal text of median 181 tokens; text-only ones: log-normal of median 992. Both are
    cut at 2048. The parameters were chosen so that LLaVA's scheme wastes about what it wastes on its own data: 29 % of the slots,
    39 % with the wait for the slowest of 8 ranks.
    """
    random = np.random.default_rng(665)
    image = IMAGE_TOKENS + 1 + np.exp(random.normal(5.2, 0.52, int(NUM_IMAGE * scale)))
    text = 1 + np.exp(random.normal(6.9, 0.8, int(NUM_TEXT * scale)))
    lengths = np.minimum(np.concatenate([image, text]), MAX_LENGTH).astype(np.int32)
    modalities = np.repeat(np.array([1, 0], dtype=np.int8), [len(image), len(text)])
    order = random.permutation(len(lengths))
    return lengths[order], modalities[order]


def our_steps(
    lengths: np.ndarray,
    modalities: np.ndarray,
    world_size: int,
    micro_batch_size: int,
    budget: int = 0,
    order: str = "modality_length",
) -> list[MicroStep]:
    """Return one epoch of steps of `micro_batch_size` samples per rank: one micro-batch each, or packed up to `budget` tokens."""
    sampler = Sampler(lengths, modalities, world_size * micro_batch_size, 0, order)
    plan = BatchPlan(world_size, micro_batch_size, budget)
    dealt = [plan.deal(sampler.step(step), lengths) for step in range(sampler.steps_per_epoch)]
    return [[rank[micro] for rank in ranks] for ranks in dealt for micro in range(len(ranks[0]))]


def guessed_steps(lengths: np.ndarray, modalities: np.ndarray, world_size: int, micro_batch_size: int) -> list[MicroStep]:
    """Return our steps when texts are only known to about 10 %, as from their bytes: the index plans with such estimates."""
    image_tokens = np.where(modalities == 1, IMAGE_TOKENS, 0)
    error = np.exp(np.random.default_rng(10).normal(0, 0.1, len(lengths)))
    planned = np.minimum(image_tokens + (lengths - image_tokens) * error, MAX_LENGTH).astype(np.int32)
    return our_steps(planned, modalities, world_size, micro_batch_size)


def split_evenly(indices: list[int], lengths: list[int], num_chunks: int) -> list[list[int]]:
    """Split the indices, which are positions in `lengths`, into chunks of one size with similar totals.

    A count that does not divide is dealt in turn, without balancing.
    """
    if len(indices) % num_chunks:
        return [indices[k::num_chunks] for k in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in indices:
        lightest = totals.index(min(totals))
        chunks[lightest].append(index)
        totals[lightest] = totals[lightest] + lengths[index] if len(chunks[lightest]) < size else float("inf")
    return chunks


def length_grouped(lengths: list[int], batch_size: int, world_size: int, generator: torch.Generator | None) -> list[int]:
    """Return a permutation, cut into megabatches of world_size * batch_size; each is sorted from long to short and split evenly."""
    permutation = torch.randperm(len(lengths), generator=generator).tolist()
    order = []
    for megabatch in _chunks(permutation, world_size * batch_size):
        for chunk in split_evenly(sorted(megabatch, key=lambda i: lengths[i], reverse=True), lengths, world_size):
            order.extend(chunk)
    return order


def modality_length_grouped(lengths: list[int], batch_size: int, world_size: int, generator: torch.Generator | None) -> list[int]:
    """Return LLaVA 1.5's data order, rewritten from a description of its llava_trainer.py. `lengths` of texts are negative.

    Megabatches of one modality each, shuffled; the last one of each modality, even when full, goes to the end by index.
    The two inner permutations come from the global generator whatever `generator` is, as in the original. Raises ValueError when a
    length is 0, because its sign does not tell its modality.
    """
    if 0 in lengths:
        raise ValueError(f"sample {lengths.index(0)} has length 0: its sign should tell its modality")
    if min(lengths) > 0 or max(lengths) < 0:
        return length_grouped(lengths, batch_size, world_size, generator)
    kept, last = [], []
    for sign in (1, -1):
        ids = [i for i, length in enumerate(lengths) if sign * length > 0]
        grouped = length_grouped([abs(lengths[i]) for i in ids], batch_size, world_size, None)
        megabatches = _chunks([ids[i] for i in grouped], world_size * batch_size)
        kept.extend(megabatches[:-1])
        last.extend(megabatches[-1])
    shuffled = [kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()]
    return [i for megabatch in [*shuffled, sorted(last)] for i in megabatch]


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def llava_steps(lengths: np.ndarray, modalities: np.ndarray, world_size: int, micro_batch_size: int) -> list[MicroStep]:
    """Return one epoch of LLaVA's order. It groups by text; true token counts stand in for its word counts, which flatters it."""
    signed = np.where(modalities == 1, lengths - IMAGE_TOKENS, -lengths).tolist()
    torch.manual_seed(0)
    return _cut(np.array(modality_length_grouped(signed, micro_batch_size, world_size, None)), world_size, micro_batch_size)


def random_steps(lengths: np.ndarray, modalities: np.ndarray, world_size: int, micro_batch_size: int) -> list[MicroStep]:
    """Return one epoch of a plain permutation."""
    return _cut(np.random.default_rng(0).permutation(len(lengths)), world_size, micro_batch_size)


def efficiency(steps: list[MicroStep], lengths: np.ndarray, is_packed: bool = False) -> Efficiency:
    """Compute useful over computed slots of an epoch; a rank without samples computes nothing but waits."""
    tokens = np.array([[lengths[ids].sum() for ids in ranks] for ranks in steps], dtype=np.int64)
    padded = np.array([[len(ids) * lengths[ids].max(initial=0) for ids in ranks] for ranks in steps], dtype=np.int64)
    work, useful = tokens if is_packed else padded, int(tokens.sum())
    return Efficiency(useful / int(work.sum()), useful / int(work.shape[1] * work.max(axis=1).sum()))


def _cut(order: np.ndarray, world_size: int, micro_batch_size: int) -> list[MicroStep]:
    """Cut a flat order as accelerate shards it: batch k of every `world_size` goes to rank k; the ragged end stays ragged."""
    step = world_size * micro_batch_size
    blocks = [order[i : i + step] for i in range(0, len(order), step)]
    return [[b[k * micro_batch_size : (k + 1) * micro_batch_size] for k in range(world_size)] for b in blocks]


def main() -> None:
    parser = command_parser("bench_sampler", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--micro-batch-size", type=int, default=16, help="samples per rank and step")
    parser.add_argument("--micro-batch-tokens", type=int, nargs="+", default=[4096, 8192, 16384], help="budgets to pack for")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the 665 000 samples to plan")
    options = parser.parse_args()
    lengths, modalities = llava_like_mix(options.scale)
    print(f"{len(lengths)} samples, mean length {lengths.mean():.0f}, {options.micro_batch_size} per rank and step")
    print("| order | ranks | useful per computed slot | useful per slot of the slowest rank | planning an epoch |")
    print("|---|---|---|---|---|")
    plans: dict[str, tuple[Plan, bool]] = {
        **{f"ours, packed, {budget}": (partial(our_steps, budget=budget), True) for budget in options.micro_batch_tokens},
        **{f"random, packed, {b}": (partial(our_steps, budget=b, order="random"), True) for b in options.micro_batch_tokens},
        "ours, padded": (our_steps, False),
        "ours, padded, texts known to 10 %": (guessed_steps, False),
        "LLaVA": (llava_steps, False),
        "random": (random_steps, False),
    }
    for world_size in options.ranks:
        for name, (plan, is_packed) in plans.items():
            start = time.perf_counter()
            steps = plan(lengths, modalities, world_size, options.micro_batch_size)
            seconds = time.perf_counter() - start
            found = efficiency(steps, lengths, is_packed)
            print(f"| {name} | {world_size} | {found.per_rank:.4f} | {found.slowest_rank:.4f} | {seconds:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
