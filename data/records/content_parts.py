"""Content parts in OpenAI's format: text, and media whose paths may stand inside the parts."""

from __future__ import annotations

from data.records.fields import FieldError, inline_path, is_absent, kind_of, local_path
from data.records.media_refs import MediaRef
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS

_PARTS = {
    **dict.fromkeys(("image", "image_url"), "image"),
    **dict.fromkeys(("video", "video_url"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
}
_BYTES = ("data", "base64", "bytes")
"""Keys of a part that hold the medium itself, in base64, as OpenAI's input_audio does."""
_PATHS = ("path", "url")
_SILENT = ("detail", "format", "cache_control", "id")
"""Keys of a part that are ignored: the run file sets the size at which pictures are seen, a file's bytes tell its kind."""


def kind_of_part(part: object) -> str | None:
    """Return the kind of medium that a content part stands for, whether the part is valid or not; None if it stands for none."""
    name = part.get("type") if isinstance(part, dict) else None
    return _PARTS.get(name) if isinstance(name, str) else None


class Parts:
    """Reader of the content parts of one record; media whose paths stand inside the parts are collected in `media`."""

    def __init__(self, raw: Json) -> None:
        """Prepare to read the parts of the record `raw`: parts of media that the record's own keys name need no path."""
        self.media: list[MediaRef] = []
        self._raw = raw
        self._seen = dict.fromkeys(PLACEHOLDERS, 0)  # parts of each kind of medium

    def text(self, parts: list[object], field: str) -> str:
        """Return the text of a content, with a placeholder for each medium. Raises `FieldError`."""
        # Each part is a line of its own: the same sample then has the same text in both spellings.
        return "\n".join(self._part(part, f"{field}[{j}]") for j, part in enumerate(parts))

    def _part(self, part: object, field: str) -> str:
        name = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and name == "text" and isinstance(text := part.get("text"), str):
            _check_keys(part, ("type", "text", *_SILENT), field)
            return text
        if not isinstance(part, dict) or not isinstance(name, str) or name not in _PARTS:
            raise FieldError(field, f"is no text and none of the parts {', '.join(_PARTS)} (type {str(name)[:60]!r})")
        kind, holder = _PARTS[name], part.get(name)
        boxes = [part, holder] if isinstance(holder, dict) else [part]
        for box in boxes:
            _check_keys(box, ("type", "index", *_SILENT, *_PATHS, *_BYTES, *((name,) if box is part else ())), field)
        self._check_index(part.get("index"), kind, field)
        places = [box.get(key) for box in boxes for key in _PATHS] + ([] if isinstance(holder, dict) else [holder])
        held = [inline_path(box[key], f"{field}.{key}") for box in boxes for key in _BYTES if not is_absent(box.get(key))]
        named = [local_path(value, field) for value in places if value is not None]
        paths = list(dict.fromkeys(held or named))  # beside its bytes, a path is the medium's name
        if (
            isinstance(holder, dict) and not paths and is_absent(self._raw.get(kind)) and is_absent(self._raw.get(f"{kind}s"))
        ):  # a .parquet file may hold the bytes there, which are not read with the text
            raise FieldError(field, f"has {name!r} without a path; {_readable(kind)}")
        if len(paths) > 1:
            raise FieldError(field, f"names {paths[0][:60]!r} and {paths[1][:60]!r}; keep one")
        self.media += [MediaRef(kind, path) for path in paths]
        return PLACEHOLDERS[kind]

    def _check_index(self, index: object, kind: str, field: str) -> None:
        """Count a part and check its index: the k-th part of a kind is the record's k-th medium of that kind.

        Raises `FieldError`.
        """
        due = self._seen[kind]
        self._seen[kind] += 1
        if index is not None and (isinstance(index, bool) or index != due):
            raise FieldError(f"{field}.index", f"is {str(index)[:60]}, but this is {kind} {due}: media stand in reading order")


def _readable(kind: str) -> str:
    """Return the part of a message that says how to name a medium."""
    return (
        f'name the path of a local file, or give the record a key "{kind}s" beside {{"type": "{kind}"}} (a column of .parquet '
        "may hold bytes)"
    )


def _check_keys(box: Json, known: tuple[str, ...], field: str) -> None:
    """Raise `FieldError` for a key that has a value and that is not read."""
    for key, value in box.items():
        if key not in known and not is_absent(value):
            more = "; what is watched of a video is said by the record's video_range" if key.startswith("video_") else ""
            raise FieldError(
                f"{field}.{key}", f"is {kind_of(value)} that is not read here; a part has {', '.join(known)}: remove it{more}"
            )
