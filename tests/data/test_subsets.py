"""Copies of sources without some records: those that stay are the same bytes, of every kind of file."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data.config import SourceConfig
from data.index.record_index import RecordIndex
from tests.support.archive import pack
from tests.support.data.columns import SPEC

TEXTS = [f'{{ "id": "{k}",  "query": "What\\u00e9 é?", "response": "Cat {k}." }}' for k in range(5)]
KEPT = np.array([True, False, True, True, False])


def opened(path: Path, folder: Path) -> RecordIndex:
    return RecordIndex.open(SourceConfig(str(path), media_root=str(folder)), folder / "index", {"image": SPEC})


def copied(path: Path, folder: Path, kept: np.ndarray = KEPT) -> tuple[RecordIndex, RecordIndex, Path]:
    index = opened(path, folder)
    ((name, rows),) = index.files()
    assert list(rows) == list(range(len(index)))
    index.write_subset(0, kept, target := folder / "out" / name)
    return index, opened(target, folder / "out"), target


def write(folder: Path, kind: str) -> Path:
    """Five records as a file of a kind."""
    path, rows = folder / f"m.{kind}", [json.loads(text) for text in TEXTS]
    if kind == "json":
        path.write_text("\ufeff [" + " ,\n\n".join(TEXTS) + "]")
    elif kind == "jsonl":
        path.write_bytes("\r\n".join([TEXTS[0], "", *TEXTS[1:]]).encode())
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    elif kind == "tar":
        inside = [
            (f"{k}/{'long' * 40}.{end}", b"x" * (513 * k) if end == "txt" else TEXTS[k].encode())
            for k in range(5)
            for end in ("txt", "json")
        ]
        pack(path, inside)
    elif kind == "parquet":
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"note": "of its writer"})
        parquet.write_table(table, path, row_group_size=2)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "tar", "parquet", "arrow"])
def test_the_records_that_stay_are_the_same(tmp_path: Path, kind: str) -> None:
    index, clean, _ = copied(write(tmp_path, kind), tmp_path)
    assert [clean.raw(i) for i in range(len(clean))] == [index.raw(i) for i in (0, 2, 3)]
    assert clean.lengths.tolist() == index.lengths[KEPT].tolist()


@pytest.mark.parametrize(("kind", "expected"), [("json", "[\n{}\n]\n"), ("jsonl", "{}\n")])
def test_lines_and_arrays_keep_the_bytes_of_a_record(tmp_path: Path, kind: str, expected: str) -> None:
    target = copied(write(tmp_path, kind), tmp_path)[2]
    between = ",\n" if kind == "json" else "\n"
    assert target.read_text() == expected.replace("{}", between.join(TEXTS[k] for k in (0, 2, 3)))


def test_an_archive_is_what_it_was_without_the_members_of_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, "tar")
    target = copied(path, tmp_path)[2]
    with tarfile.open(path) as old, tarfile.open(target) as new:
        expected = [member for member in old if member.name[0] in "023"]
        assert [member.get_info() for member in new] == [member.get_info() for member in expected]
        assert [_content(new, member) for member in new] == [_content(old, member) for member in expected]
    assert copied(path, tmp_path, np.ones(5, dtype=bool))[2].read_bytes() == path.read_bytes()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: Any = archive.extractfile(member)
    return io.BytesIO(file.read()).getvalue()


def test_columns_keep_their_groups_and_notes(tmp_path: Path) -> None:
    target = copied(write(tmp_path, "parquet"), tmp_path)[2]
    with parquet.ParquetFile(target) as file:
        assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [1, 2]
        assert file.schema_arrow.metadata[b"note"] == b"of its writer"
