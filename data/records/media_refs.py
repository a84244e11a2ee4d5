"""Media that a record names by its own keys or in its content parts, with what the record says of each medium."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.records.fields import FieldError, inline_path, is_absent, kind_of, local_path
from data.records.frame_times import FrameTimes
from model.batch import IGNORE_INDEX
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS, READ_BY

MAX_MEDIA = 1 << 13
"""Media of one kind in one record: the frames of two hours, one a second. Each of them is a file to be opened."""
_KEYS = {kind: (kind, f"{kind}s") for kind in PLACEHOLDERS}
_KIND_OF = {key: kind for kind, keys in _KEYS.items() for key in keys}
_SAID = frozenset({"set", "video_range", "audio_state"})
"""Keys that say something of a record's media."""
_MAX_CLASS = 2**31 - 1
_WORDS = {"image": ("image", "img", "picture", "pic", "photo"), "video": ("video",), "audio": ("audio", "sound", "wav")}
_ENDINGS = ("", "_path", "_file", "_filename", "_name", "_url", "_list", "_bytes", "_base64")
_OTHER_KEYS = {
    f"{word}{number}{ending}{more}": kind
    for kind, words in _WORDS.items()
    for word in words
    for number in ("", "s")
    for ending in _ENDINGS
    for more in ("", "s")
}
"""Keys in lower case under which other trainers' records have a medium of a kind. One is a note beside media of that kind alone."""


@dataclass(frozen=True)
class MediaRef:
    """One medium that a record names."""

    kind: str  # image | video | audio
    path: str
    set: str = ""  # key of media_root for its folder (VITA); "": the key is its kind
    span: tuple[float, float] | None = None  # seconds of a video that are watched; None: all of it
    label: int = IGNORE_INDEX  # user state after a clip
    times: FrameTimes | None = None  # of a video whose frames have theirs written before them, once they are chosen

    @property
    def modality(self) -> str:
        """Return the modality whose encoder reads the medium."""
        return READ_BY[self.kind]


def media_by_kind(raw: Json, inline: list[MediaRef]) -> dict[str, list[MediaRef]]:
    """Return the media of each kind in the order in which the record lists them; `inline` are the media of its content parts.

    `set` is the folder of pictures and videos, `video_range` the seconds that are watched, `audio_state` a class per clip. Raises
    `FieldError`, also for media that are named in both places, whose order would be a guess, and for those under keys that are not
    read: a record that loses its picture would be learned as if it had none.
    """
    present = {_KIND_OF[key] for key in raw if key in _KIND_OF}
    named = {kind: _named(raw, kind) if kind in present else [] for kind in PLACEHOLDERS}
    if inline and (twice := next((kind for kind, refs in named.items() if refs), None)):
        raise FieldError(twice, "media are named both by the record and by its content parts; keep one")
    found = named
    if inline:
        found = {kind: [ref for ref in inline if ref.kind == kind] for kind in PLACEHOLDERS}
        for kind, refs in found.items():
            _check_limit(kind, len(refs), kind)
    _check_other_keys(raw, found)
    if raw.keys().isdisjoint(_SAID):
        return found
    images, videos, clips = found["image"], found["video"], found["audio"]
    folders = _sets(raw.get("set"), len(images), len(videos))
    seen = [replace(ref, set=folder) for ref, folder in zip([*images, *videos], folders)]
    spans = _spans(raw.get("video_range"), len(videos))
    states = _states(raw.get("audio_state"), len(clips))
    return {
        "image": seen[: len(images)],
        "video": [replace(ref, span=span) for ref, span in zip(seen[len(images) :], spans)],
        "audio": [replace(ref, label=state) for ref, state in zip(clips, states)],
    }


def _check_other_keys(raw: Json, found: dict[str, list[MediaRef]]) -> None:
    """Raise `FieldError` for a key that holds the record's only media of a kind, and that is not read here."""
    for key, value in raw.items():
        kind = _OTHER_KEYS.get(str(key).lower())
        if kind is None or key in _KIND_OF or found[kind]:
            continue
        if not isinstance(value, bool | int | float) and not is_absent(value):
            raise FieldError(key, f"is not read here, and the record has no {kind!r}; write it under that key, or remove it")


def _named(raw: Json, kind: str) -> list[MediaRef]:
    """Return the media of one kind that the record's own keys name. Raises `FieldError`."""
    keys = [key for key in _KEYS[kind] if raw.get(key) is not None]
    if len(keys) > 1:
        raise FieldError(keys[0], f"both {keys[0]!r} and {keys[1]!r} are there; keep one")
    if not keys:
        return []
    key, value = keys[0], raw[keys[0]]
    if not isinstance(value, list):
        return [MediaRef(kind, _path_of(value, key))]
    _check_limit(key, len(value), kind)
    return [MediaRef(kind, _path_of(item, f"{key}[{i}]")) for i, item in enumerate(value)]


def _path_of(value: object, field: str) -> str:
    """Return the path of a medium: a string, or ms-swift's {"path"} or {"bytes"}, whose bytes JSON holds in base64.

    Raises `FieldError`.
    """
    if not isinstance(value, dict):
        return local_path(value, field)
    if foreign := sorted(key for key, item in value.items() if key not in ("path", "bytes") and not is_absent(item)):
        raise FieldError(f"{field}.{foreign[0]}", "is not read here; a medium has path or bytes: remove it")
    content, path = value.get("bytes"), value.get("path")
    if is_absent(content):
        return local_path(path, f"{field}.path")
    return inline_path(content, f"{field}.bytes")


def _check_limit(field: str, count: int, kind: str) -> None:
    if count > MAX_MEDIA:
        raise FieldError(field, f"names {count} {kind} files; at most {MAX_MEDIA} are read: make several records of it")


def _sets(value: object, num_images: int, num_videos: int) -> list[str]:
    """Return the set of each picture, then of each video (VITA: one set for all, or a list of one per picture)."""
    if value is None:
        return [""] * (num_images + num_videos)
    if isinstance(value, list):
        if num_videos:
            raise FieldError("set", "is a list, one per image, but the record has videos too; name one set for all")
        _check_count("set", len(value), "sets", num_images, "images")
    for i, name in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(name, str) or not name:
            field = f"set[{i}]" if isinstance(value, list) else "set"
            raise FieldError(field, "is empty" if name == "" else f"is {kind_of(name)}, not the name of a set")
    return value if isinstance(value, list) else [str(value)] * (num_images + num_videos)


def _spans(value: object, num_videos: int) -> Sequence[tuple[float, float] | None]:
    """Return the watched seconds of each video, None for all; `value` is [start, end], or a list of such pairs."""
    if value is None:
        return [None] * num_videos
    many = isinstance(value, list) and bool(value) and all(isinstance(pair, list) for pair in value)
    pairs = value if many and isinstance(value, list) else [value]
    _check_count("video_range", len(pairs), "ranges", num_videos, "videos")
    return [_span(pair, f"video_range[{i}]" if many else "video_range") for i, pair in enumerate(pairs)]


def _span(pair: object, field: str) -> tuple[float, float]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_seconds, pair)):
        raise FieldError(field, f"{str(pair)[:60]} is no [start, end] in seconds")
    start, end = float(pair[0]), float(pair[1])
    if start >= end:
        raise FieldError(field, f"starts at {start} s and ends at {end} s; the end must come later")
    return start, end


def _is_seconds(value: object) -> bool:
    # Comparisons, because isfinite would overflow on a whole number of 400 digits. NaN fails the comparisons as well.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _states(value: object, num_clips: int) -> list[int]:
    """Return the user's state after each clip; IGNORE_INDEX where the record has none."""
    if value is None:
        return [IGNORE_INDEX] * num_clips
    states = value if isinstance(value, list) else [value]
    _check_count("audio_state", len(states), "classes", num_clips, "clips")
    found: list[int] = []
    for i, state in enumerate(states):
        if isinstance(state, bool) or not isinstance(state, int) or not 0 <= state <= _MAX_CLASS:
            field = f"audio_state[{i}]" if isinstance(value, list) else "audio_state"
            raise FieldError(field, f"{str(state)[:60]} is no class; classes are whole numbers from 0 on")
        found.append(state)
    return found


def _check_count(field: str, count: int, what: str, num_media: int, media: str) -> None:
    if count != num_media:
        raise FieldError(field, f"{count} {what}, {num_media} {media} in the record; one each is needed")
