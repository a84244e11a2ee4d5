"""The contract between `data` and `model`: what one micro-batch is, and how many tokens a medium takes.

Shape legend, used in every docstring of this project:
B batch, T tokens, D hidden, V vocabulary, N media rows, L tokens per row, K spliced rows, M media, S supervised positions,
n samples.

Whatever would cost a search or a host sync on the device is computed by `collate` on the CPU and stands here as an index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.tile_tokens import TileMap, map_rows, map_weights, tile_map

IGNORE_INDEX = -100
PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""What stands for one medium in a record's text, by the kind of medium."""
READ_BY = {"image": "image", "video": "image", "audio": "audio"}
"""The modality whose encoder reads a kind of medium: the frames of a video are rows of pictures, and `<video>` is no token."""


@dataclass(frozen=True)
class ImageSpec:
    """JSON-able facts about a vision tower: all that `data` needs to prepare its input and count its tokens."""

    size: int  # side of the square input in pixels
    patch: int  # side of one patch in pixels
    num_prefix: int  # rows the tower puts before the patches: CLS, registers
    select: str  # patch: patches only | cls_patch: all rows
    resize: str  # shortest_edge: then centre crop (CLIP) | exact: both sides at once (SigLIP)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3  # PIL's number of the filter; 3 is bicubic
    rescale: float = 1 / 255
    shrink: int = 1  # the projector makes one token of shrink x shrink patches
    queries: int = 0  # tokens the projector makes of each view whatever its size; 0: as many as patches
    newline: bool = False  # the projector has a line break: behind each line of tiles, or behind a picture or video without them


@dataclass(frozen=True)
class AudioSpec:
    """JSON-able facts about an audio encoder: log-mel frames in, one token per `strides` frames out."""

    num_mels: int
    window_frames: int  # the longest row the encoder takes; longer clips are split
    full_window: bool  # every row is padded with silence to the whole window, as Whisper was trained
    strides: tuple[int, ...]  # of the layers that shorten a row, one after the other: n -> (n - 1) // stride + 1
    sampling_rate: int = 16_000  # samples per second
    n_fft: int = 400  # samples
    hop: int = 160  # samples per frame
    num_prompts: int = 0  # learned rows before every clip
    num_states: int = 0  # classes of the user's state after a clip; 0: nothing reads it


MediaSpec = ImageSpec | AudioSpec
"""Facts about one modality's encoder."""


def image_spec(specs: dict[str, MediaSpec]) -> ImageSpec:
    """That of the vision tower. Raises `KeyError` if the model has none."""
    spec = specs["image"]
    if not isinstance(spec, ImageSpec):
        raise TypeError(f"the image spec is {type(spec).__name__}")
    return spec


def spec_from_json(value: dict[str, Any]) -> MediaSpec:
    """What `spec_to_json` wrote. Raises `KeyError` or `TypeError` for anything else."""
    fields = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items() if name != "kind"}
    return _SPECS[value["kind"]](**fields)


def spec_to_json(spec: MediaSpec) -> dict[str, Any]:
    """Plain JSON values, with the kind of spec."""
    kind = next(name for name, cls in _SPECS.items() if isinstance(spec, cls))
    fields = {name: list(item) if isinstance(item, tuple) else item for name, item in dataclasses.asdict(spec).items()}
    return {"kind": kind, **fields}


_SPECS: dict[str, Any] = {"image": ImageSpec, "audio": AudioSpec}


@dataclass(frozen=True)
class MediaMeta:
    """What is known of one medium before it is decoded."""

    num_rows: int = 1  # encoder rows: tiles of a picture, frames of a video
    num_frames: int = 0  # mel frames of a clip
    grid: tuple[int, int] = (1, 1)  # tiles across and down, without the thumbnail or the base view
    size: tuple[int, int] = (0, 0)  # of a picture whose tiles keep its aspect, in pixels (width, height); else (0, 0)
    max_tiles: int = 0  # more tokens than these many tiles have are shrunk to as many; 0: they stay


def num_tokens(spec: MediaSpec, meta: MediaMeta) -> int:
    """Tokens one medium takes in the sequence. The only place that counts them: index, expansion and splice all ask here."""
    if isinstance(spec, AudioSpec):
        return spec.num_prompts + sum(row_tokens(spec, meta))
    if (tiles := _tile_map(spec, meta)) is not None:
        return view_tokens(spec) + tiles.num_tokens
    return sum(row_tokens(spec, meta)) + spec.newline


def row_tokens(spec: MediaSpec, meta: MediaMeta) -> tuple[int, ...]:
    """Tokens of each encoder row of one medium, in order; of a picture whose tiles keep its aspect, those of its bars too."""
    if isinstance(spec, AudioSpec):
        return tuple(_shortened(spec, frames) for frames in row_frames(spec, meta))
    return (view_tokens(spec),) * meta.num_rows


def view_tokens(spec: ImageSpec) -> int:
    """Tokens of one view of a picture."""
    patches = (spec.size // spec.patch // spec.shrink) ** 2
    return spec.queries or patches + (spec.num_prefix if spec.select == "cls_patch" else 0)


def token_rows(spec: MediaSpec, meta: MediaMeta, width: int) -> np.ndarray:
    """Which projected row each token of one medium is, (num_tokens,) int64; (num_tokens, 4) where `token_weights` has weights.

    Row l of the medium's encoder row n is n * width + l; -1, -2 ... are the projector's own extra rows 0, 1 ...
    """
    if isinstance(spec, ImageSpec) and (tiles := _tile_map(spec, meta)) is not None:
        found = map_rows(tiles, width)
        base = np.arange(view_tokens(spec))
        return np.concatenate([base if found.ndim == 1 else np.repeat(base[:, None], 4, axis=1), found])
    tokens = np.array(row_tokens(spec, meta), dtype=np.int64)
    rows = np.flatnonzero(np.arange(width) < tokens[:, None])
    if isinstance(spec, AudioSpec):
        return np.concatenate([-1 - np.arange(spec.num_prompts), rows])
    return np.concatenate([rows, np.full(int(spec.newline), -1)])


def token_weights(spec: MediaSpec, meta: MediaMeta) -> np.ndarray | None:
    """Weights (num_tokens, 4) float32 of the rows that are summed to each token; None where every token is one row."""
    tiles = _tile_map(spec, meta) if isinstance(spec, ImageSpec) else None
    if tiles is None or not tiles.is_shrunk:
        return None
    base = np.tile(np.array(ONE_ROW, dtype=np.float32), (num_tokens(spec, meta) - tiles.num_tokens, 1))
    return np.concatenate([base, map_weights(tiles)])


ONE_ROW = (1.0, 0.0, 0.0, 0.0)
"""Weights of a token that is its first row."""


def _tile_map(spec: ImageSpec, meta: MediaMeta) -> TileMap | None:
    if meta.size == (0, 0):
        return None
    return tile_map(meta.size, meta.grid, spec.size // spec.patch // spec.shrink, meta.max_tiles)


def row_frames(spec: AudioSpec, meta: MediaMeta) -> tuple[int, ...]:
    """Valid mel frames of each encoder row of a clip: whole windows, then the rest."""
    whole, rest = divmod(meta.num_frames, spec.window_frames)
    return (spec.window_frames,) * whole + ((rest,) if rest else ())


def row_width(spec: MediaSpec, num_frames: int = 0) -> int:
    """Tokens L that the encoder makes of each row of a batch; `num_frames`: mel frames that rows are padded to."""
    return _shortened(spec, num_frames) if isinstance(spec, AudioSpec) else view_tokens(spec)


def row_shape(spec: MediaSpec) -> tuple[int, ...]:
    """Of one blank encoder row: the shortest there is, where rows are not all of one length."""
    if isinstance(spec, AudioSpec):
        return (spec.num_mels, spec.window_frames if spec.full_window else 2)
    return (3, spec.size, spec.size)


def _shortened(spec: AudioSpec, frames: int) -> int:
    for stride in spec.strides:
        frames = (frames - 1) // stride + 1
    return frames


@dataclass(frozen=True)
class Media:
    """Encoder input of one modality, for all samples of a batch in reading order.

    Row k of the flattened projector output (N * L, D), k = rows[i], goes to flat position slots[i] = b * T + t. Rows from N * L
    on are those that the projector itself holds: a line break between rows of tiles, prompts before a clip.
    """

    values: Tensor  # (N, 3, H, W) pixels, float32 or bytes that are still to be normalised; (N, M, F) log-mel float32
    rows: Tensor  # (K,) int64, or (K, 4)
    slots: Tensor  # (K,) int64
    lengths: Tensor | None = None  # (N,) valid mel frames of each row; None: all of a row is valid
    ends: Tensor | None = None  # (M,) flat position of the last token of each picture, video or clip
    labels: Tensor | None = None  # (M,) user state after each clip, or IGNORE_INDEX
    weights: Tensor | None = None  # (K, 4) float32: a token is the sum of its rows times these; None: it is its one row

    def to(self, device: torch.device) -> Media:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Media:
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> Media:
        tensors = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Media(*(None if t is None else move(t) for t in tensors))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a row per sample padded on the right, or, packed, all samples one after the other in one row.

    A batch of no samples is legal: it is one row of padding without supervision.
    """

    input_ids: Tensor  # (B, T) placeholders already expanded: one id per feature row
    labels: Tensor  # (B, T) already shifted: the target of position t, or IGNORE_INDEX
    attention_mask: Tensor | None  # (B, T) 1 for real tokens; None when nothing is padded
    position_ids: Tensor  # (B, T)
    supervised: Tensor  # (S,) flat positions b * T + t that carry a label
    owners: Tensor  # (S,) which sample of the batch each of them belongs to
    sample_ids: Tensor  # (n,) index of each sample over all sources; -1 for padding in place of one
    source_ids: Tensor  # (n,)
    lengths: tuple[int, ...]  # (n,) real tokens of each sample, on the CPU
    segment_lengths: tuple[int, ...] | None = None  # packed: tokens of each segment of the one row; else None
    segment_borders: Tensor | None = None  # (n + 1,) int32, packed: where each segment starts, and the end of the last
    media: dict[str, Media] = field(default_factory=dict)  # by modality; a modality nobody has is absent

    @property
    def num_real_tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    @property
    def num_supervised(self) -> int:
        return self.supervised.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies from pinned memory do not wait for the device."""
        return self._map(lambda t: t.to(device, non_blocking=True), {m: v.to(device) for m, v in self.media.items()})

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory(), {m: v.pin_memory() for m, v in self.media.items()})

    def _map(self, move: Callable[[Tensor], Tensor], media: dict[str, Media]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: move(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **moved, media=media)
