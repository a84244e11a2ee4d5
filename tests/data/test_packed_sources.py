"""Laws of sources that are no plain file: compressed lines, and folders of Hugging Face's datasets, read as the same records."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from data.config import SourceConfig
from data.index.record_index import RecordIndex, source_files
from data.records.record import parse
from model.errors import ConfigError, DataError
from tests.support.data.columns import PICTURES, SPEC, TURNS, content

QUERY = {"query": "What?", "response": "A cat on a mat."}
RECORDS = [{"id": str(k), "image": f"{k}.png", "conversations": TURNS} for k in range(3)] + [{"id": "q", **QUERY}]


def opened(path: Path, folder: Path) -> RecordIndex:
    return RecordIndex.open(SourceConfig(str(path), media_root=str(folder)), folder / "index", {"image": SPEC})


def save_to_disk(folder: Path, columns: dict[str, Any], rows_per_batch: int = 2, files: int = 1) -> Path:
    """Write a folder as datasets 4 does: state.json and streams of record batches."""
    table, names = pyarrow.table(columns), [f"data-{k:05d}-of-{files:05d}.arrow" for k in range(files)]
    share = -(-table.num_rows // files)
    folder.mkdir()
    for k, name in enumerate(names):
        with pyarrow.OSFile(str(folder / name), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table.slice(k * share, share), max_chunksize=rows_per_batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_compressed_file_gives_the_records_of_the_plain_one(tmp_path: Path, suffix: str) -> None:
    text = json.dumps(RECORDS) if suffix == ".json" else "\n".join(map(json.dumps, RECORDS))
    (tmp_path / f"m{suffix}").write_text(text)
    packed = tmp_path / f"m{suffix}.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    plain, index = opened(tmp_path / f"m{suffix}", tmp_path), pickle.loads(pickle.dumps(opened(packed, tmp_path)))
    assert [index.raw(i) for i in range(len(index))] == RECORDS
    assert index.lengths.tolist() == plain.lengths.tolist() and index.where(2) == plain.where(2)
    packed.write_bytes(gzip.compress(json.dumps(RECORDS[0] if suffix == ".jsonl" else RECORDS[:1]).encode()))
    assert len(opened(packed, tmp_path)) == 1 and len(list(tmp_path.glob(f"index/unpacked/*/*/m{suffix}"))) == 1
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"m\.jsonl?\.gz: is cut short or damaged"):
        opened(packed, tmp_path)
    assert not list(tmp_path.glob("index/unpacked/*/*/*"))


def test_a_python_without_zstd_says_how_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(__import__("data.index.compressed", fromlist=["OPENERS"]).OPENERS, ".zst", None)
    with pytest.raises(ConfigError, match=r"needs Python 3.14, which reads .zst; unpack it first: zstd -d m.jsonl.zst"):
        source_files(SourceConfig(str(tmp_path / "m.jsonl.zst")))


@pytest.mark.parametrize(("value", "names", "contents"), PICTURES)
def test_pictures_of_a_dataset_folder(tmp_path: Path, value: Any, names: list[str], contents: list[bytes | None]) -> None:
    columns = {"image": [value, None, value], "conversations": [TURNS] * 3}
    index = opened(save_to_disk(tmp_path / "set", columns), tmp_path)
    for i in (0, 2):
        record = parse(index.raw(i), index.where(i))
        assert [ref.path for ref in record.media] == names
        assert [content(index, i, name) for name in names] == contents
    assert not parse(index.raw(1), index.where(1)).media and index.where(2) == "data-00000-of-00001.arrow:3"


def test_a_dataset_folder_gives_the_records_of_its_json(tmp_path: Path) -> None:
    """Columns of another format, a list of structs with paths beside bytes, several files and batches."""
    pictures = [[{"bytes": bytes([k]), "path": f"{k}.png"}] * (k % 2) for k in range(5)]
    texts = [[{"user": f"{k}?", "assistant": "Yes.", "source": None}] for k in range(5)]
    index = opened(save_to_disk(tmp_path / "set", {"images": pictures, "texts": texts}, files=2), tmp_path)
    for k in range(5):
        named = [picture["path"] for picture in pictures[k]]
        want = {"images": named, "texts": [{"user": f"{k}?", "assistant": "Yes."}]}
        assert parse(index.raw(k), "x:1") == parse(want, "x:1")
        assert [content(index, k, name) for name in named] == [bytes([k])] * (k % 2)


def test_folders_that_are_no_dataset_are_refused(tmp_path: Path) -> None:
    def reason(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            source_files(SourceConfig(str(path)))
        return str(caught.value)

    assert reason(tmp_path).endswith("is a folder: name a file, a pattern of files, or a folder that datasets' save_to_disk wrote")
    folder = save_to_disk(tmp_path / "set", {"conversations": [TURNS]})
    (folder / "data-00000-of-00001.arrow").unlink()
    assert "state.json names 'data-00000-of-00001.arrow', which is not there" in reason(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../data.arrow"}]}))
    assert "state.json is not as save_to_disk writes it" in reason(folder)
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert reason(tmp_path).endswith(f"holds several splits: name one of {folder}")


def test_a_damaged_arrow_file_is_one_error(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "set", {"conversations": [TURNS] * 5})
    file = folder / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for size in (0, 7, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"data-00000-of-00001.arrow: is no readable arrow file"):
            opened(folder, tmp_path)
