"""Heat of picture tokens, by how much the loss of the answer depends on each: input gradient times input, per projected row."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from data.collate import collate
from data.sample import Sample, SampleMedia
from data.text.tokenizer import pad_id
from model.input_gradient import input_gradient
from model.media_spec import ImageSpec
from model.multimodal import MultimodalLM
from tools.inspector.pictures import seen_views

LEAST_SIDE = 224
"""Least side of a drawing, in pixels: smaller pictures are enlarged, so that each token is seen."""
COLOUR = np.array([235, 40, 30], dtype=np.float64)
STRONGEST = 0.75
"""Share of the colour where the heat is highest."""


def position_heat(net: MultimodalLM, sample: Sample, pad: int) -> Tensor:
    """Return (T,) float64: how much the loss changes, to first order, if the embedding at a position were taken away.

    The absolute value of gradient times input, summed over the embedding.
    """
    _, given, gradient = input_gradient(net, collate([sample], pad).to(net._device()))
    return (gradient.double() * given.double()).sum(-1).abs()[0].cpu()


def view_heat(heat: Tensor, medium: SampleMedia) -> np.ndarray | None:
    """Return (n, g, g): the heat of each place of each of the medium's n views; None where its tokens are no grid of places.

    `heat` (T,) is that of the sample. A token that is a sum of four rows gives each its part. Of a picture or video at its own size
    it is (n, h, w), and frames that share a patch share its heat.
    """
    of_medium = heat[medium.start : medium.start + medium.length].numpy()
    if medium.native is not None:
        times, high, wide = medium.grid
        of_features = of_medium if medium.places is None else of_medium[medium.places]
        by_place = of_features.reshape(times, high // medium.native.shrink, wide // medium.native.shrink)
        return by_place.repeat(medium.values.shape[2], axis=0)
    num_views = len(medium.values)
    rows = medium.rows if medium.rows.ndim == 2 else medium.rows[:, None]
    weights = medium.weights if medium.weights is not None else np.eye(1, rows.shape[1])
    by_row = np.zeros(num_views * medium.width)
    parts = np.broadcast_to(of_medium[:, None] * weights, rows.shape)
    kept = (rows >= 0) & (rows < len(by_row))  # the projector's own rows, such as a line break, have no place
    np.add.at(by_row, rows[kept], parts[kept])
    views = by_row.reshape(num_views, medium.width)
    side = math.isqrt(medium.width)
    if side * side != medium.width:
        views, side = views[:, 1:], math.isqrt(medium.width - 1)  # the tower's CLS row comes first
    return views.reshape(num_views, side, side) if side * side == views.shape[1] else None


def drawn(medium: SampleMedia, spec: ImageSpec, views: np.ndarray) -> list[np.ndarray]:
    """Draw the heat (n, h, w) on the pictures of a medium -> n pictures (H, W, 3) of bytes; the highest heat of all is full."""
    highest = views.max() or 1.0
    drawings = []
    for picture, heat in zip(seen_views(medium, spec), views):
        times = -(-LEAST_SIDE // max(picture.shape[:2]))
        large = picture.repeat(times, 0).repeat(times, 1).astype(np.float64)
        rows, columns = (np.arange(large.shape[axis]) * heat.shape[axis] // large.shape[axis] for axis in (0, 1))
        share = (heat / highest * STRONGEST)[rows][:, columns][:, :, None]
        grey = large.mean(2, keepdims=True)
        drawings.append((grey * (1 - share) + COLOUR * share).round().astype(np.uint8))
    return drawings


def heat_of(net: MultimodalLM, sample: Sample, tokenizer: object) -> list[tuple[SampleMedia, np.ndarray]]:
    """Return the pictures and videos of a sample with the heat of their views."""
    heat = position_heat(net, sample, pad_id(tokenizer))  # type: ignore[arg-type]
    found = []
    for medium in (medium for of in sample.media.values() for medium in of if medium.kind != "audio"):
        if (views := view_heat(heat, medium)) is not None:
            found.append((medium, views))
    return found
