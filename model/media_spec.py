"""Facts about media encoders, and the number and order of tokens that a medium takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model.files.untrusted import Json
from model.tile_tokens import TileMap, map_rows, map_weights, tile_map

PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""Placeholder of one medium in a record's text, by the kind of medium."""
READ_BY = {"image": "image", "video": "image", "audio": "audio"}
"""Modality whose encoder reads a kind of medium: frames of a video are rows of pictures, and `<video>` is not a token."""
DEFAULT_TOKENS = {modality: PLACEHOLDERS[modality] for modality in sorted(set(READ_BY.values()))}
"""Token whose positions take the features of a modality, where a model has none of its own."""


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
    queries: int = 0  # tokens the projector makes of each view, whatever its size; 0: as many as patches
    newline: bool = False  # the projector has a line break: after each line of tiles, or after a picture or video without tiles
    placeholder: str = PLACEHOLDERS["image"]  # token whose positions take features


@dataclass(frozen=True)
class NativeSpec(ImageSpec):
    """JSON-able facts about a tower that reads pictures at their own size, as packed patches; `size` is the smallest side.

    `resize` is the rule by which sizes are chosen, an entry of `data.media.native_size.FITTED`.
    """

    frames: int = 1  # frames of a video that make one patch; a still picture is repeated
    multiple: int = 1  # sides of pictures are multiples of this many patches
    min_pixels: int = 0  # of a resized picture
    max_pixels: int = 0
    longest: int = 0  # longest side of a resized picture in pixels; 0: any
    max_patches: int = 0  # most patches of a picture; 0: any
    video_pixels: tuple[int, ...] = ()  # least and most pixels of a video; () = of each frame those of a picture
    window: int = 0  # side in pixels of the squares that most blocks attend in; 0: in the whole picture
    table: int = 0  # side of the square table of learned positions, which is interpolated to each picture; 0: none
    align_corners: bool = True  # the table's corner rows stand at the centres of a picture's corner patches
    antialias: bool = False  # a table that is larger than the picture is averaged, not sampled; corners are not aligned then
    bicubic: bool = False  # the table is resized by cubic curves; corners are not aligned then
    grows: bool = False  # a picture narrower than a token is enlarged to one before its size is chosen
    reader: str = ""  # Glm4v | Glm46V: whose processor of transformers reads the media; "" = the tower says it
    axes: int = 1  # of the language model's positions: 1, or 3 for time, row and column
    ticks: float = 0.0  # positions per second of a video on the axis of time; 0: one per pair of frames
    video_placeholder: str = ""  # token of a video's features; "" = that of pictures
    video_stamps: tuple[str, ...] = ()  # tokens around each pair of frames, whose time stands before them as text; () = no times
    video_shared: bool = True  # video_pixels are of all frames together (Qwen3-VL); False: of each frame
    video_tokens: int = 0  # cap on a video's tokens, or on a frame's if video_shared; 0: none
    line_ends: tuple[str, ...] = ()  # tokens behind each line of a picture's features, and behind the last one; () = none


@dataclass(frozen=True)
class AudioSpec:
    """JSON-able facts about an audio encoder: log-mel frames in, one token per `strides` frames out.

    Frames overlap or are padded as `features` says, an entry of `data.media.audio.FEATURES`.
    """

    num_mels: int
    window_frames: int  # the longest row the encoder takes; longer clips are split
    full_window: bool  # every row is padded with silence to the whole window, as Whisper was trained
    strides: tuple[int, ...]  # of the layers that shorten a row, one after the other: n -> (n - kernel) // stride + 1
    sampling_rate: int = 16_000  # samples per second
    n_fft: int = 400  # samples
    hop: int = 160  # samples per frame
    num_prompts: int = 0  # learned rows before every clip
    num_states: int = 0  # classes of the user's state after a clip; 0: no state head
    placeholder: str = PLACEHOLDERS["audio"]  # token whose positions take features
    drops_odd: bool = False  # the encoder's second stride is a mean of pairs, and a last row without a partner gives no token
    features: str = "whisper"  # whisper: log10 of the mel power, scaled to the clip's maximum | kaldi: Kaldi's filter banks
    kernels: tuple[int, ...] = ()  # rows that each of these layers needs for one, where it pads nothing; () = 1 for each
    num_early: int = 1  # the first strides, which stand before the encoder's blocks
    dither: float = 0.0  # kaldi: deviation of the noise on samples of 16 bits
    means: tuple[float, ...] = ()  # kaldi: of each band over the encoder's training data, subtracted; () = none
    scales: tuple[float, ...] = ()  # kaldi: factor of each band after that


MediaSpec = ImageSpec | AudioSpec
"""Facts about one modality's encoder."""


def image_spec(specs: dict[str, MediaSpec]) -> ImageSpec:
    """Return the ImageSpec of the vision tower. Raises `KeyError` if the model has none."""
    spec = specs["image"]
    if not isinstance(spec, ImageSpec):
        raise TypeError(f"the image spec is {type(spec).__name__}")
    return spec


def placeholder_tokens(specs: Mapping[str, MediaSpec]) -> dict[str, str]:
    """Return the token of each modality whose positions take its features; the usual one of a modality that the model lacks."""
    return DEFAULT_TOKENS | {modality: spec.placeholder for modality, spec in specs.items()}


def spec_from_json(value: Json) -> MediaSpec:
    """Read a spec that `spec_to_json` wrote. Raises `KeyError` or `TypeError` for anything else."""
    fields: Json = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items() if name != "kind"}
    return _SPECS[value["kind"]](**fields)


def spec_to_json(spec: MediaSpec) -> Json:
    """Return the spec as plain JSON values, with the kind of spec."""
    kind = next(name for name, cls in _SPECS.items() if isinstance(spec, cls))
    fields = {name: list(item) if isinstance(item, tuple) else item for name, item in dataclasses.asdict(spec).items()}
    return {"kind": kind, **fields}


_SPECS: dict[str, type[MediaSpec]] = {"native": NativeSpec, "image": ImageSpec, "audio": AudioSpec}


@dataclass(frozen=True)
class MediaMeta:
    """Facts about one medium that are known before it is decoded."""

    num_rows: int = 1  # encoder rows: tiles of a picture, frames of a video
    num_frames: int = 0  # mel frames of a clip
    grid: tuple[int, int] = (1, 1)  # tiles across and down, without the thumbnail or the base view
    size: tuple[int, int] = (0, 0)  # of a picture whose tiles keep its aspect, in pixels (width, height); else (0, 0)
    max_tiles: int = 0  # a picture with more tokens than this many tiles is shrunk to that number; 0: never
    patches: tuple[int, int, int] = (0, 0, 0)  # of a picture at its own size: pairs of frames, patches down and across
    seconds: float = 0.0  # of a video at its own size: from one pair of frames to the next
    moments: tuple[float, ...] = ()  # seconds from a video's start to each pair of frames, where these are written as text
    inside: tuple[tuple[int, tuple[int, ...]], ...] = ()  # token ids that stand inside the medium, each before its k-th feature


def num_tokens(spec: MediaSpec, meta: MediaMeta) -> int:
    """Return the number of tokens one medium takes in the sequence.

    Index, expansion and splice all call it: no other code counts tokens.
    """
    return num_features(spec, meta) + sum(len(ids) for _, ids in meta.inside)


def num_features(spec: MediaSpec, meta: MediaMeta) -> int:
    """Return the number of a medium's tokens that its encoder and projector make; at its own size one per square of patches."""
    if isinstance(spec, AudioSpec):
        return spec.num_prompts + sum(row_tokens(spec, meta))
    if isinstance(spec, NativeSpec):
        return math.prod(meta.patches) // spec.shrink**2
    if (tiles := _tile_map(spec, meta)) is not None:
        return view_tokens(spec) + tiles.num_tokens
    return sum(row_tokens(spec, meta)) + spec.newline


def row_tokens(spec: MediaSpec, meta: MediaMeta) -> tuple[int, ...]:
    """Return the number of tokens of each encoder row of one medium, in order, including tokens of bars around a tiled picture."""
    if isinstance(spec, AudioSpec):
        return tuple(_shortened(spec, frames) for frames in row_frames(spec, meta))
    return (view_tokens(spec),) * meta.num_rows


def view_tokens(spec: ImageSpec) -> int:
    """Return the number of tokens of one view of a picture."""
    patches = (spec.size // spec.patch // spec.shrink) ** 2
    return spec.queries or patches + (spec.num_prefix if spec.select == "cls_patch" else 0)


def token_rows(spec: MediaSpec, meta: MediaMeta, width: int) -> np.ndarray:
    """Return the projected row of each token of one medium, (num_tokens,) int64; (num_tokens, 4) where `token_weights` has weights.

    Row l of the medium's encoder row n is n * width + l; -1, -2 ... are the projector's own extra rows 0, 1 ...
    """
    if isinstance(spec, ImageSpec) and (tiles := _tile_map(spec, meta)) is not None:
        found = map_rows(tiles, width)
        base = np.arange(view_tokens(spec))
        return np.concatenate([base if found.ndim == 1 else np.repeat(base[:, None], 4, axis=1), found])
    if isinstance(spec, NativeSpec):
        return np.arange(num_features(spec, meta))
    tokens = np.array(row_tokens(spec, meta), dtype=np.int64)
    rows = np.flatnonzero(np.arange(width) < tokens[:, None])
    if isinstance(spec, AudioSpec):
        return np.concatenate([-1 - np.arange(spec.num_prompts), rows])
    return np.concatenate([rows, np.full(int(spec.newline), -1)])


def token_weights(spec: MediaSpec, meta: MediaMeta) -> np.ndarray | None:
    """Return the weights (num_tokens, 4) float32 of the rows that are summed to each token; None where every token is one row."""
    tiles = _tile_map(spec, meta) if isinstance(spec, ImageSpec) else None
    if tiles is None or not tiles.is_shrunk:
        return None
    base = np.tile(np.array(ONE_ROW, dtype=np.float32), (num_tokens(spec, meta) - tiles.num_tokens, 1))
    return np.concatenate([base, map_weights(tiles)])


ONE_ROW = (1.0, 0.0, 0.0, 0.0)
"""Weights of a token that equals its first row."""


def _tile_map(spec: ImageSpec, meta: MediaMeta) -> TileMap | None:
    if meta.size == (0, 0) or isinstance(spec, NativeSpec):
        return None
    return tile_map(meta.size, meta.grid, spec.size // spec.patch // spec.shrink, meta.max_tiles)


def row_frames(spec: AudioSpec, meta: MediaMeta) -> tuple[int, ...]:
    """Return the valid mel frames of each encoder row of a clip: whole windows, then the rest.

    A rest that is too short for one token takes what it lacks from the window before it.
    """
    whole, rest = divmod(meta.num_frames, spec.window_frames)
    found = (spec.window_frames,) * whole + ((rest,) if rest else ())
    if whole and 0 < rest < (least := least_frames(spec)):
        return (*found[:-2], spec.window_frames + rest - least, least)
    return found


def least_frames(spec: AudioSpec) -> int:
    """Return the fewest mel frames of which the encoder and the projector make one token."""
    least = 1
    for stride, kernel in reversed(layers(spec)):
        least = (least - 1) * stride + kernel
    return least


def layers(spec: AudioSpec) -> tuple[tuple[int, int], ...]:
    """Return the stride and the kernel of each layer that shortens a row."""
    return tuple(zip(spec.strides, spec.kernels or (1,) * len(spec.strides), strict=True))


def row_width(spec: MediaSpec, num_frames: int = 0) -> int:
    """Return the tokens L of each row of a batch, or of each group of patches. `num_frames`: mel frames that rows are padded to."""
    if isinstance(spec, AudioSpec):
        return _shortened(dataclasses.replace(spec, drops_odd=False), num_frames)
    return 1 if isinstance(spec, NativeSpec) else view_tokens(spec)


def row_shape(spec: MediaSpec) -> tuple[int, ...]:
    """Return the shape of one blank encoder row: the shortest possible one, where rows differ in length; of a patch."""
    if isinstance(spec, NativeSpec):
        return (3, spec.frames, spec.patch, spec.patch)
    if isinstance(spec, AudioSpec):
        return (spec.num_mels, spec.window_frames if spec.full_window else max(2, least_frames(spec)))
    return (3, spec.size, spec.size)


def _shortened(spec: AudioSpec, frames: int) -> int:
    for i, (stride, kernel) in enumerate(layers(spec)):
        frames = max(1, frames // stride) if spec.drops_odd and i == 1 else max(0, (frames - kernel) // stride + 1)
    return frames
