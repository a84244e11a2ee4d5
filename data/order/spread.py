"""Choice of a few records spread evenly over all sources."""

from __future__ import annotations

import numpy as np


def spread_evenly(sizes: np.ndarray, max_samples: int) -> np.ndarray:
    """Choose min(max_samples, all) distinct ids over all sources, or one per source if that is more.

    Source s holds sizes[s] consecutive ids.
    """
    starts = np.cumsum(sizes) - sizes
    least = np.minimum(sizes, 1)
    total = int(sizes.sum())
    wanted = max(min(max_samples or total, total), int(least.sum()))
    # In proportion to size; a source whose share is less than one gets one, and the others share what is left.
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
