"""Media in columns of files, as several formats hold them: values, the names that a record gets, the bytes behind them."""

from __future__ import annotations

from typing import Any

from data.index.record_index import RecordIndex
from data.records.record import MediaRef
from model.media_spec import ImageSpec

SPEC = ImageSpec(28, 14, 1, "patch", "exact", (0.5,) * 3, (0.5,) * 3)
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat on a mat."}]
PICTURES: list[tuple[Any, list[str], list[bytes | None]]] = [
    ({"bytes": b"one", "path": "a/1.png"}, ["a/1.png"], [b"one"]),
    ({"bytes": b"one", "path": None}, ["image[0]"], [b"one"]),
    ({"bytes": b"one", "path": "hf://x/1.png"}, ["image[0]"], [b"one"]),
    ({"bytes": None, "path": "1.png"}, ["1.png"], [None]),
    ([{"bytes": b"1", "path": "1.png"}, {"bytes": b"2", "path": "2.png"}], ["1.png", "2.png"], [b"1", b"2"]),
    ([{"bytes": b"1", "path": "same"}, {"bytes": b"2", "path": "same"}], ["image[0]", "image[1]"], [b"1", b"2"]),
    ([{"bytes": b"1"}, {"bytes": b"2"}], ["image[0]", "image[1]"], [b"1", b"2"]),
    ([b"1", b"2"], ["image[0]", "image[1]"], [b"1", b"2"]),
    (b"one", ["image[0]"], [b"one"]),
    ("1.png", ["1.png"], [None]),
]


def content(index: RecordIndex, i: int, name: str) -> bytes | None:
    blob = index.blob(i, MediaRef("image", name))
    if blob is None:
        return None
    with blob.open() as file:
        return file.read()
