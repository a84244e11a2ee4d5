"""The contract between `data` and `model`: what one micro-batch is, and how many tokens a medium takes.

Shape legend, used in every docstring of this project:
B batch, T tokens, D hidden, V vocabulary, N media rows, L tokens per row, K spliced rows, S supervised positions.

Whatever would cost a search or a host sync on the device is computed by `collate` on the CPU and stands here as an index.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
PLACEHOLDERS = {"image": "<image>"}
"""The token that stands for one medium in a record's text, by modality."""


@dataclass(frozen=True)
class MediaSpec:
    """JSON-able facts about one modality's encoder: all that `data` needs to prepare its input and count its tokens."""

    size: int  # side of the square input in pixels
    patch: int  # side of one patch in pixels
    num_prefix: int  # rows the tower puts before the patches: CLS, registers
    select: str  # patch: patches only | cls_patch: all rows
    resize: str  # shortest_edge: then centre crop (CLIP) | exact: both sides at once (SigLIP)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3  # PIL's number of the filter; 3 is bicubic
    rescale: float = 1 / 255

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> MediaSpec:
        return MediaSpec(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})


@dataclass(frozen=True)
class MediaMeta:
    """What is known of one medium before it is decoded."""

    num_rows: int = 1  # encoder rows: views of a picture


def num_tokens(spec: MediaSpec, meta: MediaMeta) -> int:
    """Tokens one medium takes in the sequence. The only place that counts them: index, expansion and splice all ask here."""
    patches = (spec.size // spec.patch) ** 2
    return meta.num_rows * (patches + (spec.num_prefix if spec.select == "cls_patch" else 0))


@dataclass(frozen=True)
class Media:
    """Encoder input of one modality, for all samples of a batch in reading order.

    Row k of the flattened encoder output (N * L, D), k = rows[i], goes to flat position slots[i] = b * T + t.
    """

    values: Tensor  # (N, 3, H, W) float32 pixels
    rows: Tensor  # (K,) int64
    slots: Tensor  # (K,) int64

    def to(self, device: torch.device) -> Media:
        return Media(*(t.to(device, non_blocking=True) for t in (self.values, self.rows, self.slots)))

    def pin_memory(self) -> Media:
        return Media(self.values.pin_memory(), self.rows.pin_memory(), self.slots.pin_memory())


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right. A batch of no samples is legal: it is one row of padding without supervision."""

    input_ids: Tensor  # (B, T) placeholders already expanded: one id per feature row
    labels: Tensor  # (B, T) already shifted: the target of position t, or IGNORE_INDEX
    attention_mask: Tensor | None  # (B, T) 1 for real tokens; None when nothing is padded
    position_ids: Tensor  # (B, T)
    supervised: Tensor  # (S,) flat positions b * T + t that carry a label
    sample_ids: Tensor  # (B,) index of each sample over all sources; -1 for a row that is only padding
    source_ids: Tensor  # (B,)
    num_real_tokens: int  # without padding
    media: dict[str, Media] = field(default_factory=dict)  # by modality; a modality nobody has is absent

    @property
    def num_supervised(self) -> int:
        return self.supervised.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies from pinned memory do not wait for the device."""
        return self._map(lambda t: t.to(device, non_blocking=True), {m: v.to(device) for m, v in self.media.items()})

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory(), {m: v.pin_memory() for m, v in self.media.items()})

    def _map(self, move: Any, media: dict[str, Media]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: move(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **moved, media=media)
