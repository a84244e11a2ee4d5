"""Values of a media column in .parquet files: paths, bytes, or structs of both; one or a list of them."""

from __future__ import annotations

from model.files.untrusted import Json


def as_list(value: object) -> list[object]:
    """Return a column's value as a list: [] for None, and one item for a value that is no list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def present_media(value: object) -> list[object]:
    """Return the media of a column's value, without null ones. A struct whose bytes were not read counts as present."""
    return [
        item for item in as_list(value) if not (item is None or (isinstance(item, dict) and "bytes" in item and _is_empty(item)))
    ]


def _is_empty(item: Json) -> bool:
    return item["bytes"] is None and not item.get("path")


def is_unnamed(item: object) -> bool:
    """Return whether a medium is a struct without a path whose bytes were not read."""
    return isinstance(item, dict) and not item.get("path") and "bytes" not in item


def names_of(column: str, values: list[object]) -> list[object]:
    """Return the names that a record gives to the media of one of its columns: their paths or, where paths do not distinguish them,
    their places as `column[k]`.
    """
    paths = [(item.get("path") or None) if isinstance(item, dict) else None if isinstance(item, bytes) else item for item in values]
    places: list[object] = [f"{column}[{k}]" for k in range(len(values))]
    if all(isinstance(item, dict | bytes) for item in values) and len(set(paths)) < len(paths):
        return places
    return [place if path is None or (isinstance(path, str) and "://" in path) else path for path, place in zip(paths, places)]


def content_of(value: object) -> bytes | None:
    """Return the bytes of one medium, if its column holds them."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None
