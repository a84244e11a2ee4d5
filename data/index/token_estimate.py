"""Planned tokens of a record before it is rendered: an estimate from its bytes.

Every text of a turn counts one token per four bytes of UTF-8, at least one, and so do thoughts, calls and tools. A medium counts
the usual number of tokens of its kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data import anyres
from data.config import DataConfig
from data.index.json_structure import Events, after_colon, spelling
from data.index.table import KINDS
from data.records.content_parts import kind_of_part
from data.records.record import Record, RecordError, parse
from data.records.turn_keys import THOUGHT_KEYS
from model.files.untrusted import parse_json
from model.media_spec import READ_BY, AudioSpec, MediaMeta, MediaSpec, least_frames, num_tokens, row_shape

BYTES_PER_TOKEN = 4
_AUDIO_SECONDS = 10.0
_TEXT_KEYS = (b"value", b"content")
_THOUGHT_KEYS = tuple(key.encode() for key in THOUGHT_KEYS)
_CALL_KEYS, _TOOL_KEYS = (b"tool_calls", b"function_call"), (b"tools", b"functions")
_MEDIA_KEYS = tuple(key.encode() for kind in KINDS for key in (kind, kind + "s"))
_TEXT_LEVEL, _RECORD_LEVEL = 3, 1  # brackets that are open around a turn's text, and around a record's own keys


def media_tokens(specs: dict[str, MediaSpec], config: DataConfig) -> dict[str, int]:
    """Return the planned tokens of one medium of each kind; 0 for a kind that no part of the model reads.

    A picture in tiles is planned with the mean of the fewest and the most tiles, in anyres grids with the middle grid; a video with
    all the frames it may have; a clip with ten seconds.
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
        else:
            found[kind] = size * _usual(kind, spec, config).num_rows * math.prod(row_shape(spec))
    return found


def _usual(kind: str, spec: MediaSpec, config: DataConfig) -> MediaMeta:
    if isinstance(spec, AudioSpec):
        seconds = min(_AUDIO_SECONDS, config.max_seconds)
        return MediaMeta(num_frames=max(least_frames(spec), int(seconds * spec.sampling_rate) // spec.hop))
    if kind == "video":
        return MediaMeta(num_rows=config.max_frames)
    if config.image_fit == "anyres":
        return anyres.typical_plan(spec.size, config)
    if config.image_fit != "tiles":
        return MediaMeta()
    tiles = math.ceil((config.min_tiles + config.max_tiles) / 2)
    return MediaMeta(num_rows=tiles + (config.thumbnail and tiles > 1))


def least_tokens(specs: dict[str, MediaSpec], config: DataConfig) -> dict[str, int]:
    """Return the fewest tokens that one medium of each kind takes; 0 for a kind that no part of the model reads."""
    found = {}
    for kind in KINDS:
        spec = specs.get(READ_BY[kind])
        rows = {"image": config.min_tiles if config.image_fit == "tiles" else 1, "video": config.min_frames}.get(kind, 1)
        frames = least_frames(spec) if isinstance(spec, AudioSpec) else 0
        found[kind] = 0 if spec is None else num_tokens(spec, MediaMeta(num_rows=rows, num_frames=frames))
    return found


def tokens_of_size(num_bytes: int) -> int:
    """Estimate the tokens of `num_bytes` bytes of text, at least one."""
    return max(1, num_bytes // BYTES_PER_TOKEN)


def plan_by_parsing(raw: bytes) -> tuple[int, tuple[int, ...]]:
    """Parse a record; return its planned text tokens and how many media of each of `KINDS` it names.

    A record that breaks a rule is planned by its size and by the media written in it.
    """
    value: object = None
    try:
        value = parse_json(raw)
        record = parse(value, "", needs_answer=False)
    except (ValueError, RecordError):  # found and named when the record is read
        return tokens_of_size(len(raw)), _written_media(value)
    text = sum(tokens_of_size(len(text.encode())) for text in _record_texts(record))
    return text, tuple(sum(ref.kind == kind for ref in record.media) for kind in KINDS)


def _record_texts(record: Record) -> Iterator[str]:
    """Yield every text of a record that a template writes."""
    for turn in record.turns:
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


@dataclass(frozen=True)
class Plans:
    """Planned sizes of the n records of a window."""

    text_tokens: np.ndarray  # (n,) int32
    media: np.ndarray  # (n, 3) int16


@dataclass(frozen=True)
class _Strings:
    """Strings of a window (s,): events of their quotes, bytes between them, and brackets open around them."""

    opens: np.ndarray
    closes: np.ndarray
    length: np.ndarray
    level: np.ndarray


def plan_records(window: np.ndarray, events: Events, depth: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Plans:
    """Plan the records at [start, stop) of a window. `events` are those of the records alone, with quotes in pairs.

    The texts are the values of the keys "value" and "content" of turns, with their thoughts and the record's "system"; the media
    are those that the record's own keys name. Records whose texts are lists of parts, whose media are no strings, or that have
    tools or calls, are parsed.
    """
    quotes = np.flatnonzero(events.quote)
    opens, closes = quotes[0::2], quotes[1::2]
    strings = _Strings(opens, closes, events.at[closes] - events.at[opens] - 1, depth[opens])
    first, last = np.searchsorted(events.at, start), np.searchsorted(events.at, stop)
    tokens, in_parts = _texts(window, events, strings, first, last)
    media, nested = _media(window, events, depth, strings, first)
    tokens = np.where(tokens > 0, tokens, np.maximum(1, (stop - start) // BYTES_PER_TOKEN))
    for i in sorted({*in_parts.tolist(), *nested.tolist()}):
        tokens[i], media[i] = plan_by_parsing(window[start[i] : stop[i]].tobytes())
    return Plans(tokens.astype(np.int32), np.minimum(media, np.iinfo(np.int16).max).astype(np.int16))


def _texts(
    window: np.ndarray, events: Events, strings: _Strings, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the texts of each record (n,), 0 without texts, and the records that must be parsed.

    These are the records whose texts are lists, or that have calls.
    """
    said, which = _keys(window, events, strings, _TEXT_LEVEL, (*_TEXT_KEYS, *_THOUGHT_KEYS, *_CALL_KEYS))
    beside, _ = _keys(window, events, strings, _RECORD_LEVEL, (b"system", *_TOOL_KEYS))
    keys = np.concatenate([said, beside])
    optional = np.concatenate([which >= len(_TEXT_KEYS), np.ones(len(beside), dtype=bool)])
    order = np.argsort(keys, kind="stable")
    keys, optional = keys[order], optional[order]
    is_key, begins = after_colon(window, events.at[strings.closes[keys]])
    value = np.minimum(keys + 1, len(strings.opens) - 1)
    is_text = is_key & (events.at[strings.opens[value]] == begins)
    is_nested = (window[begins] == ord("[")) | (optional & (window[begins] == ord("{")))
    listed = strings.opens[keys[is_key & is_nested]]
    value, optional = value[is_text], optional[is_text]
    saved = events.saved[strings.closes[value]] - events.saved[strings.opens[value]]
    length = strings.length[value]
    tokens = np.where(optional & (length == 0), 0, np.maximum(1, (length - saved) // BYTES_PER_TOKEN))
    total = np.concatenate([[0], np.cumsum(tokens)])
    low, high = (np.searchsorted(strings.opens[value], border) for border in (first, last))
    return total[high] - total[low], _owners(first, listed)


def _media(
    window: np.ndarray, events: Events, depth: np.ndarray, strings: _Strings, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many media of each kind each record's own keys name (n, 3), and the records that must be parsed.

    These are the records whose media lists hold more than strings.
    """
    media = np.zeros((len(first), len(KINDS)), dtype=np.int64)
    keys, kinds = _keys(window, events, strings, _RECORD_LEVEL, _MEDIA_KEYS)
    kinds //= len(_MEDIA_KEYS) // len(KINDS)
    is_key, begins = after_colon(window, events.at[strings.closes[keys]])
    owners = _owners(first, strings.opens[keys])
    is_path, is_list = (is_key & (window[begins] == ord(byte)) for byte in '"[')
    np.add.at(media, (owners[is_path], kinds[is_path]), 1)
    if not is_list.any():
        return media, owners[:0]
    opening = np.searchsorted(events.at, begins[is_list])
    brackets = np.flatnonzero(np.diff(depth, prepend=0))
    closing = brackets[np.searchsorted(brackets, opening, side="right")]
    num_strings = np.searchsorted(strings.opens, closing) - np.searchsorted(strings.opens, opening)
    np.add.at(media, (owners[is_list], kinds[is_list]), num_strings)
    return media, owners[is_list][depth[closing] > depth[opening]]


def _keys(
    window: np.ndarray, events: Events, strings: _Strings, level: int, words: tuple[bytes, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices, in order, of the strings at `level` that are one of `words`, and which word each is."""
    here = np.flatnonzero(strings.level == level)
    length = strings.length[here]
    alike = {size: here[length == size] for size in {len(word) for word in words}}
    found = [alike[len(word)] for word in words]
    found = [some[spelling(window, events.at[strings.opens[some]] + 1, word)] for some, word in zip(found, words)]
    keys, which = np.concatenate(found), np.repeat(np.arange(len(words)), [len(some) for some in found])
    order = np.argsort(keys, kind="stable")
    return keys[order], which[order]


def _owners(first: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Return the records that events belong to."""
    return np.searchsorted(first, events, side="right") - 1
