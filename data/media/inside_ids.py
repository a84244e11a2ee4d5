"""Token ids that stand inside media, before, between and behind their features: what a tokenizer adds to facts about a medium."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from transformers import PreTrainedTokenizerFast

from data.media.line_ends import with_line_ends
from data.media.video_stamps import Stamps
from data.records.frame_times import frame_stamp
from model.errors import ConfigError
from model.media_spec import ImageSpec, MediaMeta, MediaSpec, NativeSpec, view_tokens

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
"""Texts of Idefics3 and SmolVLM around every view, and before the features of the whole picture."""


@dataclass(frozen=True)
class TileIds:
    """Ids of the texts around the views of a picture in tiles, in Idefics3 and SmolVLM."""

    tiles: tuple[tuple[tuple[int, ...], ...], ...]  # before each tile, by row and column
    whole: tuple[int, ...]  # before the view of the whole picture, behind its tiles
    alone: tuple[int, ...]  # before it, where it is not cut
    end: tuple[int, ...]
    write: Callable[[str], tuple[int, ...]]  # ids of a text behind a feature

    def inside(self, meta: MediaMeta, width: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return what stands inside a picture, each text before its k-th feature. `width`: features of a view."""
        across, down = meta.grid
        tiles = [self.tiles[row][column] for row in range(down) for column in range(across)] if meta.num_rows > 1 else []
        texts = [*tiles, self.whole if tiles else self.alone, self.end]
        return tuple((view * width, ids) for view, ids in enumerate(texts))

    def between(self, moments: Sequence[float], width: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return what stands inside a video: before each frame its time, but for the first, whose time stands before the video."""
        stamps = [self.write(f"{AROUND}{frame_stamp(moment)}{AROUND}{WHOLE}") for moment in moments[1:]]
        return tuple((frame * width, ids) for frame, ids in enumerate([self.alone, *stamps, self.end]))


@dataclass(frozen=True)
class InsideIds:
    """Ids that stand inside the media of a run's records."""

    features: Mapping[str, int] = field(default_factory=dict)  # of a feature, by kinds of media that have one of their own
    lines: tuple[int, ...] = ()  # behind each line of a picture's features at its own size, and behind the last one; () = none
    stamps: Stamps | None = None  # write the times of a video inside it
    tiles: TileIds | None = None  # of pictures in tiles, where texts stand between them

    def added(self, kind: str, spec: MediaSpec, meta: MediaMeta) -> MediaMeta:
        """Return the facts about a medium of this kind with the ids inside it."""
        if isinstance(spec, NativeSpec):
            return with_line_ends(meta, spec, self.lines) if self.stamps is None else self.stamps.write(meta)
        if self.tiles is None or not isinstance(spec, ImageSpec):
            return meta
        if kind == "video":
            return replace(meta, inside=self.tiles.between(meta.moments, view_tokens(spec)))
        return replace(meta, inside=self.tiles.inside(meta, view_tokens(spec)))


def tile_ids(tokenizer: PreTrainedTokenizerFast, placeholder: str, side: int) -> TileIds:
    """Return the ids of the texts around views of a picture of at most `side` x `side` tiles. `placeholder`: token of a feature.

    Texts that are no tokens of their own become several. Raises `ConfigError` for a tokenizer without the token around views.
    """
    if tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(AROUND) or 0) != AROUND:
        raise ConfigError(
            f"data.image_fit = 'idefics' writes {AROUND} around every view of a picture, and the tokenizer has no such token: name "
            "it in model.llm.new_tokens, or use another data.image_fit"
        )

    ids = partial(_ids_behind, tokenizer, placeholder)

    def tile(row: int, column: int) -> tuple[int, ...]:
        line = "\n" if row and not column else ""
        return ids(f"{line}{AROUND}<row_{row + 1}_col_{column + 1}>")

    rows = tuple(tuple(tile(row, column) for column in range(side)) for row in range(side))
    return TileIds(rows, ids(f"\n\n{AROUND}{WHOLE}"), ids(AROUND + WHOLE), ids(AROUND), ids)


def _ids_behind(tokenizer: PreTrainedTokenizerFast, placeholder: str, text: str) -> tuple[int, ...]:
    """Return the ids of a text behind a feature, where it stands: tokenizers may treat the begin of a text in another way."""
    return tuple(tokenizer(placeholder + text, add_special_tokens=False)["input_ids"][1:])
