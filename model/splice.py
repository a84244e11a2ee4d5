"""Replacement of placeholder embeddings by media features."""

import torch
from torch import Tensor

from model.batch import Media


def placeholder_rows(rows: Tensor, media: Media) -> Tensor:
    """Return the feature row of each placeholder (K, D) from the projected rows (N * L + E, D): one of them or a weighted sum of
    four.

    Sums are made in float32, so that in bfloat16 a token that is one row equals that row bitwise, also beside tokens that are sums.
    """
    if media.weights is None:
        return rows.index_select(0, media.rows)
    total = torch.zeros(media.rows.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for row, weight in zip(media.rows.unbind(1), media.weights.unbind(1)):
        total = total + rows.index_select(0, row).float() * weight[:, None]
    return total.to(rows.dtype)


def splice(embeds: Tensor, features: Tensor, media: Media) -> Tensor:
    """Write one feature row over each placeholder: embeds (B, T, D), features (K, D) -> (B, T, D).

    Row i of `features` goes to flat position media.slots[i]. With K = 0 the result equals `embeds` and still depends on `features`,
    so that a batch without media gives the projector a gradient of zeros and not none. Raises `ValueError` when the numbers differ.
    """
    if features.shape[0] != media.slots.shape[0]:
        raise ValueError(f"{features.shape[0]} feature rows for {media.slots.shape[0]} placeholders")
    flat = embeds.flatten(0, 1).index_copy(0, media.slots, features.to(embeds.dtype))
    return flat.view_as(embeds)
