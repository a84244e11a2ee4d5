"""Planned tokens of a record before it is rendered: an estimate from its bytes.

Every text of a turn counts one token per four bytes of UTF-8, at least one, and so do thoughts, calls and tools. A medium counts
the usual number of tokens of its kind.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.config import DataConfig
from data.index.reader import MAX_RECORD_BYTES, RowError, decode_json
from data.index.table import KINDS
from data.media.idefics_tiles import usual_frame_texts, usual_idefics
from data.media.pixel_budget import least_meta, usual_meta
from data.media.tiling import typical_plan
from data.records.content_parts import kind_of_part
from data.records.preferences import is_preference
from data.records.record import Record, RecordError, parse
from data.records.shapes import shapes_of
from data.records.turn_keys import THOUGHT_KEYS
from model.files.untrusted import MAX_JSON_DEPTH, Json, is_deeper
from model.media_spec import READ_BY, AudioSpec, MediaMeta, MediaSpec, NativeSpec, least_frames, num_tokens, row_shape

BYTES_PER_TOKEN = 4
_AUDIO_SECONDS = 10.0
_TEXT_KEYS, _TOOL_KEYS = ("value", "content"), ("tools", "functions")
_OPTIONAL_KEYS = frozenset({*THOUGHT_KEYS, "tool_calls", "function_call"})
_MEDIA_KEYS = {key: kind for kind in KINDS for key in (kind, f"{kind}s")}
Plan = tuple[int, tuple[int, ...]]
"""Planned text tokens of a record, and how many media of each of `KINDS` it names."""
_NO_MEDIA = (0,) * len(KINDS)
_UNREADABLE: Plan = (1, _NO_MEDIA)


def media_tokens(specs: dict[str, MediaSpec], config: DataConfig) -> dict[str, int]:
    """Return the planned tokens of one medium of each kind; 0 for a kind that no part of the model reads.

    A picture at its own size or in tiles as Idefics3 cuts it is planned as one of 640 x 480 pixels; a picture in other tiles with
    the mean of the fewest and the most tiles, in anyres grids with the middle grid; a video with all the frames it may have; a clip
    with ten seconds.
    """
    found = {}
    for kind in KINDS:
        spec = specs.get(READ_BY[kind])
        found[kind] = 0 if spec is None else num_tokens(spec, _usual(kind, spec, config))
    return found


def media_bytes(specs: dict[str, MediaSpec], config: DataConfig) -> dict[str, int]:
    """Return the planned bytes of encoder input of one medium of each kind; 0 for a kind that no part of the model reads."""
    found = {}
    for kind in KINDS:
        spec = specs.get(READ_BY[kind])
        size = 1 if kind != "audio" and config.image_decode == "fast" else 4
        if spec is None:
            found[kind] = 0
        elif isinstance(spec, AudioSpec):
            frames = _usual(kind, spec, config).num_frames
            found[kind] = size * spec.num_mels * max(frames, spec.window_frames if spec.full_window else 0)
        elif isinstance(spec, NativeSpec):
            patch = math.prod(row_shape(spec)) // (1 if kind == "video" else spec.frames)
            found[kind] = size * math.prod(_usual(kind, spec, config).patches) * patch
        else:
            found[kind] = size * _usual(kind, spec, config).num_rows * math.prod(row_shape(spec))
    return found


def _usual(kind: str, spec: MediaSpec, config: DataConfig) -> MediaMeta:
    if isinstance(spec, AudioSpec):
        seconds = min(_AUDIO_SECONDS, config.max_seconds)
        return MediaMeta(num_frames=max(least_frames(spec), int(seconds * spec.sampling_rate) // spec.hop))
    if isinstance(spec, NativeSpec):
        return usual_meta(kind, spec, config)
    if kind == "video":
        found = MediaMeta(num_rows=config.max_frames)
        return replace(found, inside=usual_frame_texts(config.max_frames)) if config.frame_times else found
    if config.image_fit == "anyres":
        return typical_plan(spec.size, config)
    if config.image_fit == "idefics":
        return usual_idefics(spec, config)
    if config.image_fit != "tiles":
        return MediaMeta()
    tiles = math.ceil((config.min_tiles + config.max_tiles) / 2)
    return MediaMeta(num_rows=tiles + (config.thumbnail and tiles > 1))


def least_tokens(specs: dict[str, MediaSpec], config: DataConfig) -> dict[str, int]:
    """Return the fewest tokens that one medium of each kind takes; 0 for a kind that no part of the model reads."""
    found = {}
    for kind in KINDS:
        spec = specs.get(READ_BY[kind])
        if isinstance(spec, NativeSpec):
            found[kind] = num_tokens(spec, least_meta(kind, spec, config))
            continue
        rows = {
            "image": config.min_tiles if config.image_fit == "tiles" else 1,
            "video": 1 if config.frame_times else config.min_frames,
        }.get(kind, 1)
        frames = least_frames(spec) if isinstance(spec, AudioSpec) else 0
        found[kind] = 0 if spec is None else num_tokens(spec, MediaMeta(num_rows=rows, num_frames=frames))
    return found


def tokens_of_size(num_bytes: int) -> int:
    """Estimate the tokens of `num_bytes` bytes of text, at least one."""
    return max(1, num_bytes // BYTES_PER_TOKEN)


def plan_range(data: mmap.mmap, start: int, stop: int) -> Plan:
    """Plan the record at bytes [start, stop) of a file; one that is too large to be read is not even copied."""
    return _UNREADABLE if stop - start > MAX_RECORD_BYTES else plan_record(data[start:stop])


def plan_record(raw: bytes) -> Plan:
    """Plan a record of JSON; one that cannot be decoded is planned by its size."""
    try:
        value = decode_json(raw)
    except RowError:  # named when the record is read
        return tokens_of_size(len(raw)), _NO_MEDIA
    return plan_value(value, len(raw))


def plan_value(value: object, num_bytes: int) -> Plan:
    """Plan a decoded record, which takes `num_bytes` as JSON: as it is written where that is plain, else as it is parsed.

    A record without texts is planned by its size.
    """
    if not isinstance(value, dict):
        return tokens_of_size(num_bytes), _NO_MEDIA
    tokens, media = _plain_texts(value), _plain_media(value)
    if tokens is None or media is None or shapes_of(value) or is_preference(value):
        return plan_by_parsing(value, num_bytes)
    return tokens or tokens_of_size(num_bytes), media


def _plain_texts(record: Json) -> int | None:
    """Return the tokens of the texts in the lists of a record; None if it has content parts, calls or tools, to be parsed."""
    tokens, optional = 0, [record[key] for key in ("system", *_TOOL_KEYS) if key in record]
    for value in record.values():
        members = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        for turn in members:
            if not isinstance(turn, dict):
                continue
            said = turn["value"] if "value" in turn else turn.get("content")
            if isinstance(said, str) and len(turn) == 2 and ("from" in turn or "role" in turn):  # most turns say nothing more
                tokens += _tokens_of(said)
                continue
            for key, text in turn.items():
                if key in _TEXT_KEYS:
                    if isinstance(text, list):
                        return None
                    tokens += _tokens_of(text)
                elif key in _OPTIONAL_KEYS:
                    optional.append(text)
    if not optional:
        return tokens
    if any(isinstance(text, list | dict) for text in optional):
        return None
    return tokens + sum(_tokens_of(text) for text in optional if text)


def _plain_media(record: Json) -> tuple[int, ...] | None:
    """Count the media that the record's own keys name as strings; None if they are named otherwise, to be parsed."""
    found = dict.fromkeys(KINDS, 0)
    for key, named in record.items():
        if key not in _MEDIA_KEYS:
            continue
        if isinstance(named, str):
            found[_MEDIA_KEYS[key]] += 1
        elif isinstance(named, list):
            if any(isinstance(path, list | dict) for path in named):
                return None
            found[_MEDIA_KEYS[key]] += sum(isinstance(path, str) for path in named)
    return tuple(found.values())


def plan_by_parsing(value: object, num_bytes: int) -> Plan:
    """Plan a record by its rules; one that breaks a rule is planned by its size and by the media written in it."""
    if is_deeper(value, MAX_JSON_DEPTH):  # the reader refuses it
        return tokens_of_size(num_bytes), _NO_MEDIA
    try:
        record = parse(value, "", needs_answer=False)
    except RecordError:  # named when the record is read
        return tokens_of_size(num_bytes), _written_media(value)
    tokens = sum(_tokens_of(text) for text in _record_texts(record))
    return tokens, tuple(sum(ref.kind == kind for ref in record.media) for kind in KINDS)


def _tokens_of(text: object) -> int:
    """Estimate the tokens of a text; 0 for a value that is none."""
    if not isinstance(text, str):
        return 0
    return (len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))) // BYTES_PER_TOKEN or 1


def _record_texts(record: Record) -> Iterator[str]:
    """Yield every text of a record that a template writes."""
    for turn in (*record.turns, *record.rejected):
        yield turn.content
        if thought := turn.extra.get("reasoning_content"):
            yield thought
        if calls := turn.extra.get("tool_calls"):
            yield json.dumps(calls, ensure_ascii=False)
    if record.tools:
        yield json.dumps(record.tools, ensure_ascii=False)


def _written_media(value: object) -> tuple[int, ...]:
    """Count the media that a record which breaks a rule would have without its fault.

    Without this count a part of the model could seem to have no input.
    """
    found = dict.fromkeys(KINDS, 0)
    if isinstance(value, dict):
        for kind in KINDS:
            named = value.get(kind) if value.get(kind) is not None else value.get(f"{kind}s")
            found[kind] = 0 if named is None else len(named) if isinstance(named, list) else 1
        if not any(found.values()) and isinstance(turns := value.get("messages"), list):
            contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
            for part in (part for content in contents if isinstance(content, list) for part in content):
                if (held := kind_of_part(part)) is not None:
                    found[held] += 1
    return tuple(found.values())


def plan_columns(plans: list[Plan]) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns `text_tokens` (n,) int32 and `media` (n, 3) int16 of a table, of the plans of its records."""
    tokens = np.array([tokens for tokens, _ in plans], dtype=np.int32)
    media = np.array([counts for _, counts in plans], dtype=np.int64).reshape(-1, len(KINDS))
    return tokens, np.minimum(media, np.iinfo(np.int16).max).astype(np.int16)
