"""Prefetching: workers prepare batches ahead of training, in few pieces, and in memory that is bounded."""

from __future__ import annotations

import numpy as np

from data.dataset import MultimodalDataset
from data.index.table import KINDS
from data.index.token_estimate import media_bytes

PIECES_PER_WORKER, LEAST_PIECES = 4, 16
"""Number of pieces in which a step of many micro-batches is made: enough that workers share it evenly."""
AHEAD_BYTES = 4 << 30
"""Most bytes of batches that wait for a rank, as far as their planned sizes tell."""
_TOKEN_BYTES = 4 * 8  # ids, labels, positions, mask
_LOOKED_AT = 1 << 16  # records


def micro_batches_together(per_step: int, workers: int) -> int:
    """Return how many micro-batches of a step a worker makes and sends in one piece: however many there are, the pieces are few."""
    return -(-per_step // max(PIECES_PER_WORKER * workers, LEAST_PIECES))


def prefetch_factor(pieces_per_step: int, workers: int, piece_bytes: float = 0.0) -> int | None:
    """Return how many pieces each worker makes ahead of time; None without workers.

    All workers together make more than a step ahead, as a step is awaited whole before its first forward, but no more than about
    `AHEAD_BYTES`, and at least two pieces each.
    """
    if not workers:
        return None
    wanted = -(-pieces_per_step // workers) + 1
    room = int(AHEAD_BYTES / (piece_bytes * workers)) if piece_bytes else wanted
    return max(2, min(wanted, room))


def planned_bytes(dataset: MultimodalDataset) -> float:
    """Estimate the bytes that a sample takes in a batch: nine of ten records take no more, by their planned lengths and media."""
    each, found = media_bytes(dataset.specs, dataset.config), []
    for index in dataset.indexes:
        looked_at = slice(None, None, -(-len(index) // _LOOKED_AT) or 1)
        media = sum(index.num_media(kind)[looked_at].astype(np.float64) * each[kind] for kind in KINDS)
        found.append(np.minimum(index.lengths[looked_at], dataset.config.max_length) * _TOKEN_BYTES + media)
    sizes = np.concatenate(found)
    return float(np.quantile(sizes, 0.9)) if len(sizes) else 0.0
