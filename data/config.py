"""Settings of the data: `[data]` and `[[data.sources]]` of run.toml."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from data.fit_problems import SIDE_TILES, fit_problems
from data.order.mixing import take_problem
from data.records.fields import MAX_NAME, shorten
from model.media_spec import PLACEHOLDERS

MAX_WORKERS = 512


GridSize = tuple[int, int] | str
"""A grid of tiles: [width, height] in pixels, its tiles across and down as "2x1", or all from one to another as "1x1...6x6"."""
NEXT_GRID: tuple[GridSize, ...] = ("1x2", "2x1", "2x2", "3x1", "1x3")
"""Grids of LLaVA-NeXT, in its order."""


TemplateName = Literal[
    "auto",
    "chatml",
    "gemma",
    "internlm2",
    "llama2",
    "llama3",
    "mistral",
    "mpt",
    "phi3",
    "plain",
    "vicuna_v1",
    "vita_mixtral",
    "vita_qwen",
]


@dataclass(frozen=True)
class SourceConfig:
    """Records of one kind: a file, or all files of a pattern."""

    path: str
    """Records: .json, .jsonl, .parquet or .tar; with * ? [] every file that matches, in the order of their names."""
    name: str = ""
    """Key in metrics and messages; '' = the file's stem. Two sources need two names. Without a path: a data set of
    data.catalog."""
    media_root: str | dict[str, str] = ""
    """Folder that media paths begin in; or a table with one folder per kind of medium (image, video, audio) and per set of
    records."""
    weight: float = 1.0
    """Times each record is drawn per epoch: 0.25 = a quarter, another one the next epoch; 2 = twice. For sources alone."""
    take: str = "all"
    """Records that take part at all: all, first:N, end:N or random:N; N is a number of records or a percentage, as 10%."""

    @property
    def key(self) -> str:
        return self.name or Path(self.path).stem

    @property
    def roots(self) -> dict[str, str]:
        """Return every media folder that is named, by its name in run.toml."""
        if isinstance(self.media_root, dict):
            return {f"media_root.{kind}": folder for kind, folder in self.media_root.items()}
        return {"media_root": self.media_root} if self.media_root else {}


@dataclass(frozen=True)
class DataConfig:
    """Settings of `[data]`."""

    template: TemplateName = "auto"
    """How a conversation becomes text: auto, the tokenizer's own chat template, or one of the families' formats; use what the
    model knows."""
    system: str = ""
    """System text of records that have none; '' = the template's own."""
    answer_end: str = ""
    """Token that ends an answer, where the tokenizer's own template writes nothing behind the last one, as '<|user|>' (GLM-4.1V),
    which begins the next turn; '' = the template's own."""
    max_length: int = 2048
    """Most tokens of a sample, media included: whole rounds beyond it are dropped. Raise it for long answers; memory grows
    with it."""
    placeholders: Literal["as_written", "first"] = "as_written"
    """Where media stand: as_written, where the text says so; first, in front of their turn (LLaVA, VITA)."""
    media_wrap: tuple[str, ...] = ()
    """Pair of strings written before and after every picture, as ['<im_start>', '<im_end>']; () = none."""
    image_fit: Literal["pad", "square", "tiles", "anyres", "native", "idefics"] = "pad"
    """What the tower sees of a picture: pad, on a square of the mean colour; square, as its own processor; tiles (InternVL);
    anyres (LLaVA-NeXT); native, at its own size, by towers that can; idefics, tiles with their rows and columns written between
    them (Idefics3, SmolVLM)."""
    image_decode: Literal["exact", "fast"] = "exact"
    """exact equals the Hugging Face processors to the bit; fast decodes large JPEGs at a fraction of their size."""
    min_tiles: int = 1
    """Fewest tiles of a picture under image_fit = 'tiles'."""
    max_tiles: int = 1
    """Most tiles of a picture under image_fit = 'tiles', 6 or 12 as a rule; each costs as many tokens as a whole view."""
    thumbnail: bool = True
    """Add the whole picture to its tiles as one more view, under image_fit = 'tiles'."""
    image_grid: tuple[GridSize, ...] = ()
    """Grids to choose from under anyres, as '2x1', '1x1...6x6' or [width, height] in pixels; () = LLaVA-NeXT's."""
    anyres_max: int = 0
    """A picture has at most about as many tokens as this many tiles under anyres (anyres_max_9); 0 = no limit."""
    max_images: int = 0
    """Most pictures of one record, more is a bad record; 0 = no limit."""
    order: Literal["modality_length", "length", "random", "sequential"] = "modality_length"
    """How a step is filled: modality_length, alike in media and length (fastest); length; random; sequential, as in the file."""
    packing: bool = False
    """Put several samples into one row without padding, by batch.micro_batch_tokens; faster where lengths differ much."""
    state_tokens: Literal["none", "glyphs", "digits"] = "none"
    """Begin every answer with a token that says what it replies to: glyphs (VITA 1.5), digits (VITA 1.0), or none."""
    fps: float = 1.0
    """Frames of a video that are looked at per second; fewer where min_frames and max_frames say so."""
    min_frames: int = 4
    """Fewest frames of a video."""
    max_frames: int = 16
    """Most frames of a video, spread evenly; each costs as many tokens as a picture."""
    max_seconds: float = 30.0
    """Longest clip in seconds; a longer one is a bad record. 30 is one window of Whisper."""
    max_pixels: int = 64_000_000
    """Most pixels of a picture, judged before it is decoded; more is a bad record. Lower it where memory is short."""
    workers: int = 4
    """Processes of each rank that read ahead; 0 = the rank reads by itself. 2 to 16 are usual; raise it while perf/data_wait
    is not 0."""
    follow_links: bool = False
    """Follow symbolic links that leave media_root; false refuses them. For data of your own alone."""
    on_bad_sample: Literal["quarantine", "error"] = "quarantine"
    """What a bad record does: quarantine, it is left out, counted and named; error, it ends the run."""
    on_change: Literal["refuse", "accept"] = "refuse"
    """What happens when sources changed since the run began: refuse to go on, or accept it."""
    max_bad_fraction: float = 0.001
    """Share of bad records beyond which the run ends, in [0, 1); eight are always borne."""
    max_too_long_fraction: float = 0.1
    """Share of a source's records that cannot fit max_length beyond which the start fails; 1 allows any number."""
    fit_min_pixels: int = 0
    """Fewest pixels of a picture under image_fit = 'native': a smaller one is enlarged; 0 = those of the model's own processor."""
    fit_max_pixels: int = 0
    """Most pixels of a picture under 'native', 500_000 to 2_000_000 as a rule: a larger one is shrunk; 0 = the processor's own."""
    record_max_pixels: int = 0
    """Most pixels of all pictures of a record together under 'native', an even share for each; 0 = no limit."""
    video_max_pixels: int = 0
    """Most pixels of all frames of a video together under 'native', an even share for each; 0 = as the processor allows."""
    side_tiles: int = SIDE_TILES
    """Tiles along the longer side of a picture under image_fit = 'idefics', up to its square in all; 1 = one view of each."""
    cut_tiles: bool = True
    """Cut pictures into these tiles; false: one view of each, which is enlarged to them and shrunk again (do_image_splitting)."""
    frame_times: bool = False
    """Read videos under image_fit = 'idefics' as SmolVLM does: texts before them say how many frames there are and how long the
    video lasts, and before each frame its time."""
    catalog: str = ""
    """File of named data sets, a TOML table for each: sources that have a name and no path are taken from it; '' = none."""
    sources: tuple[SourceConfig, ...] = field(default=())
    """Training data: one [[data.sources]] table per source."""
    validation: tuple[SourceConfig, ...] = field(default=())
    """Held-out data: one [[data.validation]] table per source, with the same keys but weight."""

    def problems(self) -> list[str]:
        """List what is wrong with the values, one line each; keys as in run.toml."""
        found = []
        if self.max_length < 1:
            found.append(f"data.max_length = {self.max_length} is not positive")
        if self.system and self.template == "plain":
            found.append(f"data.system = {shorten(repr(self.system), 40)} with data.template = 'plain', which has no system turn")
        if self.answer_end and self.template != "auto":
            found.append(
                f"data.answer_end = {self.answer_end!r} has no effect: data.template = {self.template!r} has an end of its own"
            )
        if len(self.media_wrap) not in (0, 2):
            found.append(f"data.media_wrap = {list(self.media_wrap)} is not a pair [before, after]")
        if self.max_images < 0:
            found.append(f"data.max_images = {self.max_images} is negative; 0 means no limit")
        if self.max_pixels < 1:
            found.append(f"data.max_pixels = {self.max_pixels} is not positive")
        found += [*fit_problems(self), *_time_problems(self)]
        if self.workers < 0:
            found.append(f"data.workers = {self.workers} is negative")
        if self.workers > MAX_WORKERS:
            found.append(
                f"data.workers = {self.workers} is more than {MAX_WORKERS}: they are processes of every rank; 2 to 16 are usual"
            )
        if not 0 <= self.max_bad_fraction < 1:
            found.append(f"data.max_bad_fraction = {self.max_bad_fraction} is not in [0, 1)")
        if not 0 <= self.max_too_long_fraction <= 1:
            found.append(f"data.max_too_long_fraction = {self.max_too_long_fraction} is not in [0, 1]; 1 allows any number")
        for table, sources in (("sources", self.sources), ("validation", self.validation)):
            keys = [source.key for source in sources]
            for key in sorted({k for k in keys if keys.count(k) > 1}):
                found.append(f"two data.{table} are called {key!r}: give each a name of its own")
            for source in sources:
                if len(source.name) > MAX_NAME:
                    found.append(
                        f"data.{table}: name = {shorten(repr(source.name), MAX_NAME)} has more than {MAX_NAME} characters: it "
                        "is a key of metrics and a part of file names"
                    )
            found += [line for source in sources for line in (*_share_problems(source, table), *_root_problems(source, table))]
        return found


def _time_problems(config: DataConfig) -> Iterator[str]:
    if not 0 < config.fps < math.inf:
        yield f"data.fps = {config.fps} is no number of frames per second; 1 to 4 are usual"
    if not 1 <= config.min_frames <= config.max_frames:
        yield f"data.min_frames = {config.min_frames} is not in [1, data.max_frames = {config.max_frames}]"
    if not 0 < config.max_seconds < math.inf:
        yield f"data.max_seconds = {config.max_seconds} is no length of a clip; 30 is one window of Whisper"


def _share_problems(source: SourceConfig, table: str) -> Iterator[str]:
    if not 0 < source.weight < math.inf:
        yield f"data.{table} {source.key!r}: weight = {source.weight} is not positive; to draw nothing from a source, leave it out"
    if table == "validation" and source.weight != 1:
        yield f"data.validation {source.key!r}: weight = {source.weight} has no effect: every validation reads the same records"
    if problem := take_problem(source.take):
        yield f"data.{table} {source.key!r}: take = {source.take!r} {problem}"


def _root_problems(source: SourceConfig, table: str) -> Iterator[str]:
    """Yield a line for each misspelt kind of medium in media_root.

    It would be taken for the name of a set, and the kind's media for media without a folder.
    """
    for key in source.media_root if isinstance(source.media_root, dict) else ():
        if key not in PLACEHOLDERS and (near := get_close_matches(key, PLACEHOLDERS, 1, 0.75)):
            yield f"data.{table} {source.key!r}: media_root.{key} is no kind of medium; did you mean {near[0]!r}?"
