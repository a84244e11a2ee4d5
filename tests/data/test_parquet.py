"""Laws of records in parquet files: a row says what the same record says as JSON; its media are read when they are asked for."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data.config import SourceConfig
from data.index.record_index import RecordIndex
from data.media.blob import MediaError
from data.records.record import MediaRef, RecordError, parse
from model.errors import ConfigError, DataError
from model.media_spec import MediaMeta, num_tokens
from tests.support.data.columns import PICTURES, SPEC, TURNS, content

TEXT, IMAGE = 1 + 15 // 4, num_tokens(SPEC, MediaMeta())


def written(path: Path, columns: dict[str, Any], row_group_size: int = 2) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def opened(path: Path, media_root: str = "") -> RecordIndex:
    return RecordIndex.open(SourceConfig(str(path), media_root=media_root), path.parent / "index", {"image": SPEC})


def test_rows_are_what_their_json_would_be(tmp_path: Path) -> None:
    rows = [{"id": str(k), "image": None if k == 1 else f"{k}.png", "conversations": TURNS} for k in range(5)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    spelt = {**columns, "conversations": [json.dumps(row["conversations"]) for row in rows]}
    (tmp_path / "m.json").write_text(json.dumps(rows))
    lines = RecordIndex.open(SourceConfig(str(tmp_path / "m.json")), tmp_path, {"image": SPEC})
    for name, table in (("structs", columns), ("json", spelt)):
        index = opened(written(tmp_path / f"{name}.parquet", table), str(tmp_path))
        for i in (4, 0, 3, 1, 2):
            assert parse(index.raw(i), "x:1") == parse(lines.raw(i), "x:1")
            assert index.where(i) == f"{name}.parquet:{i + 1}"
            assert index.blob(i, MediaRef("image", f"{i}.png")) is None
        assert index.lengths.tolist() == lines.lengths.tolist() == [TEXT + IMAGE] + [TEXT] + [TEXT + IMAGE] * 3
        assert index.modalities.tolist() == [1, 0, 1, 1, 1]


@pytest.mark.parametrize(("value", "names", "contents"), PICTURES)
def test_pictures_in_columns(tmp_path: Path, value: Any, names: list[str], contents: list[bytes | None]) -> None:
    path = written(tmp_path / "m.parquet", {"image": [value, None, value], "conversations": [TURNS] * 3})
    index = opened(path, str(tmp_path))
    for i in (0, 2):
        record = parse(index.raw(i), index.where(i))
        assert [ref.path for ref in record.media] == names
        assert [content(index, i, name) for name in names] == contents
    assert parse(index.raw(1), index.where(1)).media == ()
    assert index.lengths.tolist() == [TEXT + len(names) * IMAGE, TEXT, TEXT + len(names) * IMAGE]
    blob = index.blob(2, MediaRef("image", names[0]))
    assert blob is None or blob.name == f"m.parquet:3:{names[0]}"


NOTHING: dict[str, Any] = {"bytes": None, "path": None}
ABSENT: list[tuple[Any, Any, list[str]]] = [
    (NOTHING, {"bytes": b"one", "path": None}, ["image[0]"]),
    (NOTHING, {"bytes": b"one", "path": "1.png"}, ["1.png"]),
    ({"bytes": None, "path": ""}, {"bytes": b"one", "path": ""}, ["image[0]"]),
    ({"bytes": None}, {"bytes": b"one"}, ["image[0]"]),
    ([NOTHING, None], [None, {"bytes": b"one", "path": None}, NOTHING], ["image[0]"]),
    ([NOTHING], [NOTHING, {"bytes": b"one", "path": "1.png"}], ["1.png"]),
    ([None], [None, "1.png"], ["1.png"]),
    ([None], [None, b"one"], ["image[0]"]),
]


@pytest.mark.parametrize(("value", "other", "names"), ABSENT)
def test_pictures_that_are_null_are_absent(tmp_path: Path, value: Any, other: Any, names: list[str]) -> None:
    """A row without a picture may hold a struct of nulls, and a list null entries: neither is a picture to be looked for."""
    path = written(tmp_path / "m.parquet", {"image": [value, other], "conversations": [TURNS] * 2})
    index = opened(path, str(tmp_path))
    assert parse(index.raw(0), "x:1").media == () and parse(index.raw(0), "x:1").turns[0].content == "What?"
    record = parse(index.raw(1), "x:1")
    assert [ref.path for ref in record.media] == names
    assert content(index, 1, names[0]) == (None if other == [None, "1.png"] else b"one")


def test_tools_and_calls_are_as_their_json(tmp_path: Path) -> None:
    """Structs of one column have the same fields: those that a tool or a call has not are null, and no part of its definition."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {key: {"type": "string"}}}} for name, key in ("fx", "gy")
    ]
    calls = [{"type": "function", "function": {"name": name, "arguments": {key: "1"}}} for name, key in ("fx", "gy")]
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    path = written(tmp_path / "m.parquet", {"messages": [turns], "tools": [tools]})
    record = parse(opened(path).raw(0), "x:1")
    assert list(record.tools) == tools and record.turns[1].extra["tool_calls"] == calls
    spelt = written(tmp_path / "n.parquet", {"messages": [json.dumps(turns)], "tools": [json.dumps(tools)]})
    assert parse(opened(spelt).raw(0), "x:1") == record


def test_bytes_inside_parts_are_refused_by_name(tmp_path: Path) -> None:
    parts = [
        {"type": "image", "text": None, "image": {"bytes": b"1", "path": None}},
        {"type": "text", "text": "What?", "image": None},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A cat on a mat."}]}]
    index = opened(written(tmp_path / "m.parquet", {"messages": [turns]}))
    with pytest.raises(RecordError, match=r"messages\[0\].content\[0\]: has 'image' without a path; name the path of a local file"):
        parse(index.raw(0), "x:1")


def test_bytes_are_not_read_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = [{"bytes": b"one", "path": "1.png"}] * 2
    index = opened(written(tmp_path / "m.parquet", {"images": column, "conversations": [TURNS] * 2}))
    read: list[list[str]] = []
    real = parquet.ParquetFile.read_row_group

    def counting(self: Any, group: int, columns: list[str], **options: Any) -> Any:
        read.append(columns)
        return real(self, group, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counting)
    index.raw(0), index.raw(1)
    assert len(read) == 1 and "images.bytes" not in read[0] and "images.path" in read[0]
    assert content(index, 0, "1.png") == content(index, 1, "1.png") == b"one"
    with pytest.raises(MediaError, match=r"^'2.png' is not in m.parquet:2; media that stand elsewhere need"):
        index.blob(1, MediaRef("image", "2.png"))


def test_parts_and_their_nulls(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]
    answer = [{"type": "text", "text": "A cat on a mat.", "index": None}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    index = opened(written(tmp_path / "m.parquet", {"messages": [turns], "images": [[{"bytes": b"1", "path": None}]]}))
    record = parse(index.raw(0), index.where(0))
    assert [turn.content for turn in record.turns] == ["<image>\nWhat?", "A cat on a mat."]
    assert [content(index, 0, ref.path) for ref in record.media] == [b"1"]
    assert index.modalities.tolist() == [1]


def test_shards_and_copies(tmp_path: Path) -> None:
    for shard in range(2):
        ids = [f"{shard}{k}" for k in range(3)]
        written(tmp_path / f"{shard}.parquet", {"id": ids, "conversations": [TURNS] * 3})
    index = opened(tmp_path / "*.parquet")
    assert [index.raw(i)["id"] for i in range(6)] == ["00", "01", "02", "10", "11", "12"]
    assert [index.where(i) for i in (2, 3)] == ["0.parquet:3", "1.parquet:1"]
    stored = pickle.dumps(index)
    assert len(stored) < 1000 and pickle.loads(stored).raw(5)["id"] == "12"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "m.parquet", {"conversations": ["[", json.dumps(TURNS)]})
    index = opened(path)
    with pytest.raises(RecordError, match=r"^m.parquet:1 1: json: cannot be decoded: "):
        index.raw(0)
    assert index.raw(1)["conversations"] == TURNS
    broken = tmp_path / "broken.parquet"
    for damaged, message in ((path.read_bytes()[:-9], "is no readable parquet file"), (b"", "is no readable parquet file")):
        broken.write_bytes(damaged)
        with pytest.raises(DataError, match=f"broken.parquet: {message}"):
            opened(broken)
    with pytest.raises(DataError, match=r"has no columns .* \(conversations, messages, .*\); it has id, text"):
        opened(written(tmp_path / "n.parquet", {"id": ["1"], "text": ["a"]}))
    with pytest.raises(DataError, match="holds no record"):
        opened(written(tmp_path / "o.parquet", {"conversations": pyarrow.array([], pyarrow.string())}))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m.parquet", {"conversations": [TURNS]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[parquet\]'"):
        opened(path)
