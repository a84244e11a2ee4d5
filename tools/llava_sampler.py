"""LLaVA's data order (llava_trainer.py of LLaVA 1.5), rewritten from its description: the baseline of `bench_sampler`.

Lengths are signed: positive for samples with media, negative for text. All indices are positions in `lengths`.
"""

from __future__ import annotations

import torch


def split_evenly(indices: list[int], lengths: list[int], num_chunks: int) -> list[list[int]]:
    """Split the indices into chunks of one size with similar totals.

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
    for megabatch in _cut(permutation, world_size * batch_size):
        for chunk in split_evenly(sorted(megabatch, key=lambda i: lengths[i], reverse=True), lengths, world_size):
            order.extend(chunk)
    return order


def modality_length_grouped(lengths: list[int], batch_size: int, world_size: int, generator: torch.Generator | None) -> list[int]:
    """Return megabatches of one modality each, shuffled; the last one of each modality, even when full, goes to the end by index.

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
        megabatches = _cut([ids[i] for i in grouped], world_size * batch_size)
        kept.extend(megabatches[:-1])
        last.extend(megabatches[-1])
    shuffled = [kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()]
    return [i for megabatch in [*shuffled, sorted(last)] for i in megabatch]


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
