"""Files that are not what their names say, or hold their records one level down: each is told what it is and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.config import SourceConfig
from data.index.reader import layout_advice
from data.index.record_index import RecordIndex
from data.records.record import RecordError
from model.errors import DataError
from tests.support.runs import config_of
from tests.support.tiny_data import talk
from trainer.distributed.world import World
from trainer.records.run_data import certify_all, open_data

RECORDS = [talk("Hi", "Yes."), talk("Ho", "No.")]
WORLD = World(0, 0, 1, None)  # type: ignore[arg-type]


def opened(path: Path, content: str | bytes) -> RecordIndex:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return RecordIndex.open(SourceConfig(str(path)), path.parent / "index", {})


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"data": RECORDS}),
            "m.json:1: the file is one JSON object, not a list of records; if they are the list under 'data'",
        ),
        (
            json.dumps({"info": {"n": [1]}, "train": RECORDS, "test": RECORDS}, indent=1),
            "the list under 'train' or 'test', write that",
        ),
        (json.dumps(RECORDS[0]), "m.json:1: the file is no array; name it .jsonl if it holds one object per line"),
        (lines(RECORDS), "m.json:1: the file is no array; name it .jsonl if it holds one object per line"),
        ('{"data": [{"a": 1}', "m.json:1: the file is no array"),
        (gzip.compress(b"[]"), "m.json: is compressed; unpack it"),
        (json.dumps(RECORDS).encode("utf-16"), "m.json: is UTF-16; JSON is UTF-8"),
        (json.dumps(RECORDS).encode("utf-16-le"), "m.json: is UTF-16; JSON is UTF-8"),
    ],
)
def test_a_json_file_that_is_no_array_is_told_apart(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        opened(tmp_path / "m.json", content)
    assert message in str(error.value)


@pytest.mark.parametrize("indent", [None, 1])
def test_lines_that_are_an_array_say_so_in_every_record(tmp_path: Path, indent: int | None) -> None:
    index = opened(tmp_path / "m.jsonl", json.dumps(RECORDS, indent=indent))
    for i in range(len(index)):
        try:
            index.raw(i)
        except RecordError as error:
            assert "begins as one JSON array does, not with one object per line: name it .json" in error.reason
    with pytest.raises(RecordError):
        index.raw(0)


def test_records_over_several_lines_say_so_and_a_broken_line_does_not(tmp_path: Path) -> None:
    index = opened(tmp_path / "m.jsonl", json.dumps(RECORDS[0], indent=1))
    with pytest.raises(RecordError, match=r"records take several lines each: a .jsonl file has one per line"):
        index.raw(0)
    for name, first in (("a", "{"), ("b", "[1]"), ("c", '{"a": '), ("d", "[1, 2]")):
        path = tmp_path / f"{name}.jsonl"
        opened(path, f"{first}\n{lines(RECORDS)}")
        assert layout_advice(str(path)) == ""


@pytest.mark.parametrize("suffix", [".JSON", ".Json", ".JSONL", ".jsonL"])
def test_suffixes_count_in_whatever_case(tmp_path: Path, suffix: str) -> None:
    index = opened(tmp_path / f"m{suffix}", lines(RECORDS) if suffix.lower() == ".jsonl" else json.dumps(RECORDS))
    assert [index.raw(i) for i in range(len(index))] == RECORDS
    (tmp_path / f"n{suffix.lower()}").write_bytes((tmp_path / f"m{suffix}").read_bytes())
    assert len(RecordIndex.open(SourceConfig(str(tmp_path / "?.[jJ]*")), tmp_path / "index", {})) == 2 * len(RECORDS)


def test_parquet_in_capitals(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(RECORDS), tmp_path / "m.Parquet")
    index = RecordIndex.open(SourceConfig(str(tmp_path / "m.Parquet")), tmp_path / "index", {})
    assert index.raw(1)["conversations"] == RECORDS[1]["conversations"]


def unfed(parts: Path, folder: Path, records: list[Any]) -> DataError:
    (folder / "m.jsonl").write_text(lines(records))
    data = {"sources": [{"path": str(folder / "m.jsonl"), "media_root": str(folder)}]}
    config = config_of(parts, output_dir=str(folder / "run"), data=data)
    with pytest.raises(DataError) as error:
        certify_all(open_data(config, WORLD), config)
    return error.value


def test_a_part_that_is_not_fed_because_records_break_a_rule_names_the_rule(parts: Path, tmp_path: Path) -> None:
    said = str(unfed(parts, tmp_path, [*[["a.png"]] * 5, *["a.png"] * 2, talk("Hi", "Yes.")]))
    assert said.startswith("7 of 8 records looked at break the rules: 5 as m.jsonl:1 1: record: is a list, not an object")
    assert "; 2 as m.jsonl:6 6: record: is a string" in said
    assert said.endswith(
        "Without them [model.vision] can never be fed: no record of data.sources has an image or a video; "
        "remove the part or add data"
    )


def test_a_part_whose_records_all_break_a_rule_is_not_said_to_be_unfed(parts: Path, tmp_path: Path) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    wrong = {"messages": [{"role": "user", "content": content}, {"role": "cat", "content": "Yes."}]}
    said = str(unfed(parts, tmp_path, [wrong] * 4))
    assert "none of 4 rows can be encoded; the first: m.jsonl:1 1: messages[1].role: 'cat' is no role" in said and "fed" not in said
