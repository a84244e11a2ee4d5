"""Tokens inside a medium, and positions of three axes: time, row and column (M-RoPE).

Text takes the same position on all axes. A picture begins one behind the last position so far: its features have the position of
its begin plus their time, row and column. What follows begins behind the largest position of the medium, as in the papers of
Qwen2-VL and Qwen2.5-VL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.config import DataConfig
from data.media.inside_ids import InsideIds, tile_ids
from data.media.video_stamps import own_stamps
from model.errors import ConfigError
from model.media_spec import ImageSpec, MediaMeta, MediaSpec, NativeSpec, num_features, num_tokens


@dataclass(frozen=True)
class FeatureRun:
    """Features of a medium that follow one another without other tokens between them."""

    start: int  # token of the first
    grid: tuple[int, int, int]  # tokens: pairs of frames, down and across
    ticks: float  # positions from one pair of frames to the next

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        times, high, wide = self.grid
        return times * high * wide


def feature_places(spec: MediaSpec, meta: MediaMeta) -> np.ndarray | None:
    """Return where the features of a medium stand among its tokens (K,); None where all of its tokens are features."""
    if not meta.inside:
        return None
    places = np.arange(num_features(spec, meta))
    for first, ids in meta.inside:
        places[first:] += len(ids)
    return places


def write_inside(ids: np.ndarray, start: int, kind: str, spec: MediaSpec, meta: MediaMeta, own: InsideIds) -> None:
    """Write a medium's tokens, which begin at `start`, into the expanded `ids` (T,): its features' own id, and those inside it.

    A video's own signs take the place of those that the template wrote around it as around a picture.
    """
    if kind in own.features:
        ids[start : start + num_tokens(spec, meta)] = own.features[kind]
    if kind == "video" and own.stamps is not None:  # the template wrote what stands around a picture
        for place in (start - 1, start + num_tokens(spec, meta)):
            if 0 <= place < len(ids):
                ids[place] = own.stamps.around.get(int(ids[place]), ids[place])
    before = start
    for first, inside in meta.inside:
        ids[before + first : before + first + len(inside)] = inside
        before += len(inside)


def inside_ids(tokenizer: PreTrainedTokenizerFast, specs: dict[str, MediaSpec], config: DataConfig) -> InsideIds:
    """Return the ids inside media of a run: of features, line ends, times and texts between tiles. Raises `ConfigError`."""
    spec = specs.get("image")
    if isinstance(spec, NativeSpec):
        name = spec.video_placeholder
        features = {"video": tokenizer.convert_tokens_to_ids(name)} if name else {}
        return InsideIds(features, line_ids(tokenizer, spec), own_stamps(tokenizer, specs))
    if isinstance(spec, ImageSpec) and config.image_fit == "idefics":
        return InsideIds(tiles=tile_ids(tokenizer, spec.placeholder, config.side_tiles))
    return InsideIds()


def line_ids(tokenizer: PreTrainedTokenizerFast, spec: NativeSpec) -> tuple[int, ...]:
    """Return the ids of the tokens behind each line of a picture's features, and behind the last; () for a tower without.

    Raises `ConfigError` for a token that the tokenizer does not have.
    """
    found = tuple(tokenizer.convert_tokens_to_ids(name) for name in spec.line_ends)
    for name, number in zip(spec.line_ends, found):
        if number is None or tokenizer.convert_ids_to_tokens(number) != name:  # else it is that of unknown words
            raise ConfigError(
                f"model.vision.line_ends: the tokenizer has no token {name!r}: name it in model.llm.new_tokens, or use others"
            )
    return found


def feature_runs(start: int, spec: NativeSpec, meta: MediaMeta) -> list[FeatureRun]:
    """Return the runs of a medium that begins at token `start`: one, or one for each pair of frames with tokens between them."""
    times, high, wide = meta.patches
    high, wide, ticks = high // spec.shrink, wide // spec.shrink, spec.ticks * meta.seconds if spec.ticks and times > 1 else 1.0
    places = feature_places(spec, meta)
    if places is None:
        return [FeatureRun(start, (times, high, wide), ticks)]
    return [FeatureRun(start + int(places[k * high * wide]), (1, high, wide), ticks) for k in range(times)]


def positions_of(length: int, runs: Sequence[FeatureRun]) -> np.ndarray:
    """Return the positions (3, length) int64 of a sample whose media stand at `runs`, in reading order."""
    found = np.empty((3, length), dtype=np.int64)
    token = position = 0
    for run in runs:
        text = run.start - token
        found[:, token : run.start] = np.arange(position, position + text)
        position += text
        token = run.start + run.length
        times, high, wide = run.grid
        # Whole positions, cut off as the model's own code does.
        moments = (np.arange(times, dtype=np.float32) * np.float32(run.ticks)).astype(np.int64)
        axes = np.meshgrid(moments, np.arange(high), np.arange(wide), indexing="ij")
        found[:, run.start : token] = np.stack(axes).reshape(3, -1) + position
        position = int(found[:, run.start : token].max()) + 1
    found[:, token:] = np.arange(position, position + length - token)
    return found
