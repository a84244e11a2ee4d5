"""Laws of the index: every record's bytes are that record's, wherever it stands; a changed file is never read by old borders."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, SourceConfig
from data.index.record_index import FORMATS, RecordIndex
from data.index.sidecar import write_arrays
from data.loader import prepare_worker
from data.records.record import RecordError
from model.errors import ConfigError, DataError
from model.media_spec import AudioSpec, ImageSpec, MediaMeta, num_tokens
from trainer.errors import CANNOT_WRITE, code_of

SPEC = ImageSpec(28, 14, 1, "patch", "exact", (0.5,) * 3, (0.5,) * 3)
SOUND = AudioSpec(80, 3000, False, (1, 2))
QA = {"id": "q", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat on a mat."}]}
PICTURE = {**QA, "id": "p", "image": "a.png"}


def open_index(path: Path, folder: Path | None = None, **specs: ImageSpec) -> RecordIndex:
    return RecordIndex.open(SourceConfig(str(path)), folder or path.parent / "index", specs)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


TEXTS = st.text(st.sampled_from('ab"\\{}[],:\n \t漢🙂\u2028'), max_size=12)
VALUES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=6)
LAYOUTS = st.fixed_dictionaries({"indent": st.sampled_from([None, 0, 1, 4, "\t"]), "ensure_ascii": st.booleans()})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(objects=OBJECTS, layout=LAYOUTS, before=st.sampled_from(["", " ", "\r\n\t"]), bom=st.booleans())
def test_array_borders_give_what_json_gives(objects: list[Any], layout: dict[str, Any], before: str, bom: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = before + json.dumps(objects, **layout) + before
        index = open_index(write(Path(folder, "rows.json"), (b"\xef\xbb\xbf" if bom else b"") + text.encode()))
        assert [index.raw(i) for i in range(len(index))] == objects
        starts = [text[: text_index(text, index, i, bom)].count("\n") + 1 for i in range(len(index))]
        assert [index.where(i) for i in range(len(index))] == [f"rows.json:{line}" for line in starts]


def text_index(text: str, index: RecordIndex, i: int, bom: bool) -> int:
    """Where record `i` starts in the text: the decoder's own count, not the index's."""
    at = text.index("[") + 1
    for k in range(i + 1):
        while text[at] in " \t\r\n,":
            at += 1
        if k < i:
            at = json.JSONDecoder().raw_decode(text, at)[1]
    return at


@settings(max_examples=40, deadline=None, derandomize=True)
@given(objects=OBJECTS, newline=st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"]), last=st.booleans(), bom=st.booleans())
def test_lines_give_what_json_gives(objects: list[Any], newline: str, last: bool, bom: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = newline.join(json.dumps(value, ensure_ascii=False) for value in objects) + (newline if last else "")
        index = open_index(write(Path(folder, "rows.jsonl"), (b"\xef\xbb\xbf" if bom else b"") + text.encode()))
        assert [index.raw(i) for i in range(len(index))] == objects
        assert [index.where(i) for i in range(len(index))] == [
            f"rows.jsonl:{1 + i * newline.count(chr(10))}" for i in range(len(objects))
        ]


def test_planned_lengths_count_text_and_media(tmp_path: Path) -> None:
    two = {**PICTURE, "image": ["a", "b"]}
    seen = {**QA, "video": "v.mp4", "audios": ["a.wav"]}
    path = write(tmp_path / "m.json", json.dumps([QA, PICTURE, two, seen]))
    index = RecordIndex.open(SourceConfig(str(path)), tmp_path, {"image": SPEC, "audio": SOUND}, DataConfig(max_frames=3))
    image, text = num_tokens(SPEC, MediaMeta()), 1 + 15 // 4
    seconds = num_tokens(SOUND, MediaMeta(num_frames=1000))
    assert index.lengths.tolist() == [text, text + image, text + 2 * image, text + 3 * image + seconds]
    assert index.modalities.tolist() == [0, 1, 1, 2 | 4]
    assert [index.num_media(kind).tolist() for kind in ("image", "video", "audio")] == [[0, 1, 2, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert (index.lengths.dtype, index.modalities.dtype) == (np.int32, np.int8)
    # Another tower plans other lengths from the same sidecar, other tiles more of them.
    assert open_index(tmp_path / "m.json", tmp_path).lengths.tolist() == [text] * 4
    tiles = DataConfig(image_fit="tiles", max_tiles=4)
    tiled = RecordIndex.open(SourceConfig(str(path)), tmp_path, {"image": SPEC}, tiles)
    assert tiled.lengths.tolist()[1] == text + num_tokens(SPEC, MediaMeta(num_rows=3 + 1))


def test_a_pattern_is_one_source_in_the_order_of_the_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", "\n".join(json.dumps({**QA, "id": f"{name}{k}"}) for k in range(2)))
    index = open_index(tmp_path / "?.jsonl")
    assert [index.raw(i)["id"] for i in range(len(index))] == ["a0", "a1", "b0", "b1"]
    assert [index.where(i) for i in range(4)] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    deep = open_index(tmp_path / "**" / "a.jsonl")
    assert [deep.where(i) for i in range(4)] == ["a.jsonl:1", "a.jsonl:2", "c/a.jsonl:1", "c/a.jsonl:2"]
    # One more file, and the table is another one.
    write(tmp_path / "d.jsonl", json.dumps(QA))
    assert len(open_index(tmp_path / "?.jsonl")) == 5


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    for k in range(40):
        write(tmp_path / f"{k:02}.jsonl", json.dumps({**QA, "id": k}))
    before = len(os.listdir("/proc/self/fd"))
    index = open_index(tmp_path / "*.jsonl")
    assert [index.raw(i)["id"] for i in [*range(40), *range(40)]] == [*range(40), *range(40)]
    assert len(os.listdir("/proc/self/fd")) <= before + 33
    del index
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", "\n".join([json.dumps(QA)] * 3))
    index = open_index(path)
    path.write_bytes(path.read_bytes()[:-10])
    assert index.raw(1) == QA
    with pytest.raises(RecordError, match=r"^m.jsonl:3 3: json: cannot be read: the file has become shorter"):
        index.raw(2)


def test_a_line_that_is_no_json_is_found_when_it_is_read(tmp_path: Path) -> None:
    lines = [json.dumps(QA), '{"id": 3,', json.dumps(PICTURE), "\udcff"]
    index = open_index(write(tmp_path / "m.jsonl", "\n".join(lines).encode("utf-8", "surrogateescape")))
    assert len(index) == 4 and index.raw(2) == PICTURE and index.lengths.min() >= 1
    for i, line in ((1, 2), (3, 4)):
        with pytest.raises(RecordError, match=rf"^m.jsonl:{line} {line}: json: cannot be decoded: "):
            index.raw(i)
    with pytest.raises(RecordError, match=r"cannot be decoded: Expecting .*, at character 10 of the record$"):
        index.raw(1)


def test_a_record_that_breaks_in_an_array_is_found_when_it_is_read(tmp_path: Path) -> None:
    index = open_index(write(tmp_path / "m.json", f'[{{"id": 1,}},\n{json.dumps(QA)}]'))
    assert index.raw(1) == QA
    with pytest.raises(RecordError, match=r"^m.json:1 1: json: "):
        index.raw(0)


def test_records_without_an_id_that_share_a_line_are_told_apart(tmp_path: Path) -> None:
    lines = f'[{json.dumps(QA)}, {json.dumps(QA)},\n{json.dumps(QA)},\n{json.dumps(QA)}, {{"no": 1,}}]'
    write(tmp_path / "a.json", lines)
    write(tmp_path / "b.json", json.dumps([QA, QA]))
    write(tmp_path / "c.json", json.dumps([QA]))
    index = open_index(tmp_path / "?.json")
    assert [index.name(i) for i in range(8)] == ["[0]", "[1]", "2", "[3]", "[4]", "[0]", "[1]", "1"]
    with pytest.raises(RecordError, match=r"^a.json:3 \[4\]: json: "):
        index.raw(4)
    rows = open_index(write(tmp_path / "m.jsonl", f"{json.dumps(QA)}\n\n{json.dumps(QA)}"))
    assert [rows.name(i) for i in range(2)] == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "", "is empty; expected at least one record"),
        ("m.jsonl", "\n \n", "m.jsonl: holds no record"),
        ("m.json", " [ ] ", "m.json: holds no record"),
        ("m.json", '\n{"id": 1}', "m.json:2: the file is no array; name it .jsonl if"),
        ("m.json", '[{"a": 1},\n 3]', "m.json:2: expected the '{' of the next record; found '3]'"),
        ("m.json", '[{"a": 1},]', "m.json:1: expected the '{' of the next record; found ']'"),
        ("m.json", '[{"a": 1}\n{"a": 2}]', "m.json:2: expected ',' or ']' after a record"),
        ("m.json", '[{"a": 1}', "expected ',' or ']' after a record; found its end"),
        (
            "m.json",
            '[\n{"a": 1},\n{"a": "b}, {"c": 2}]',
            "m.json:3: the record that starts here never ends; a quote or a bracket is missing",
        ),
        ("m.json", '[{"a": 1}]\nx', "m.json:2: there is more after the end of the array; found 'x'"),
    ],
)
def test_files_that_are_no_list_of_records_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_index(write(tmp_path / name, text))
    assert message in str(caught.value)
    assert not list(tmp_path.glob("index/*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.json", "none.json' is no file"),
        ("x*.json", "matches no file"),
        ("a.csv", r"a.csv' is of no kind that is read \(.json, .jsonl, .parquet, .arrow, .tar\)"),
        ("b.*", r"matches '.*b.tar.gz', which is of no kind that is read .*; unpack it"),
        ("[ac].*", "matches '.*', which is of no kind"),
        ("d.*", r"d.json' and '.*d.jsonl'.*: make each a source"),
    ],
)
def test_paths_that_cannot_be_read_are_refused(tmp_path: Path, name: str, message: str) -> None:
    for made in ("a.csv", "b.tar.gz", "d.json", "d.jsonl"):
        write(tmp_path / made, "x")
    with pytest.raises(ConfigError, match=message):
        open_index(tmp_path / name)


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    scanned: list[Path] = []
    kind = FORMATS[".jsonl"]
    counting = replace(kind, scan=lambda path, advance: scanned.append(path) or kind.scan(path, advance))
    monkeypatch.setitem(FORMATS, ".jsonl", counting)
    return scanned


def test_the_sidecar_is_used_again_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned, path = count_scans(monkeypatch), write(tmp_path / "m.jsonl", json.dumps(QA))
    open_index(path)
    assert open_index(path).raw(0) == QA and len(scanned) == 1
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    open_index(path)
    assert len(scanned) == 2
    before = path.stat().st_mtime_ns
    write(path, json.dumps(QA) + "\n" + json.dumps(PICTURE))
    os.utime(path, ns=(before, before))
    assert len(open_index(path)) == 2 and len(scanned) == 3


def test_a_damaged_sidecar_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned, path = count_scans(monkeypatch), write(tmp_path / "m.jsonl", json.dumps(QA))
    open_index(path)
    (sidecar,) = tmp_path.glob("index/*")
    for damage in (b"", sidecar.read_bytes()[:-8], b"junk", pickle.dumps([1])):
        sidecar.write_bytes(damage)
        assert open_index(path).raw(0) == QA
    assert len(scanned) == 5


def test_two_files_of_one_name_do_not_share_a_sidecar(tmp_path: Path) -> None:
    for name, value in (("a", QA), ("b", PICTURE)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "m.jsonl", json.dumps(value))
    indices = [open_index(tmp_path / name / "m.jsonl", tmp_path / "index") for name in "ab"]
    assert [index.raw(0) for index in indices] == [QA, PICTURE]
    assert len(list(tmp_path.glob("index/*"))) == 2


def _private_growth(index: RecordIndex, reads: int, results: Any) -> None:
    def private_kib() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))

    prepare_worker(0)
    index.raw(0)
    before = private_kib()
    for i in range(0, len(index), len(index) // reads):
        index.raw(i)
    results.put(private_kib() - before)


def test_a_worker_holds_nothing_of_what_it_reads(tmp_path: Path) -> None:
    """By the kernel's count, of a forked worker that reads a tenth of 40 MB."""
    with (tmp_path / "m.jsonl").open("w") as file:
        file.writelines(json.dumps({**QA, "id": i, "note": "x" * 4000}) + "\n" for i in range(10_000))
    index = open_index(tmp_path / "m.jsonl")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=_private_growth, args=(index, 1000, results))
    worker.start()
    grown = results.get(timeout=60)
    worker.join(60)
    assert grown < 2048  # KiB


def _open_and_read(path: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    index = open_index(path)
    results.put([index.raw(i)["id"] for i in range(len(index))])


def test_two_processes_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", json.dumps([{"id": i} for i in range(500)]))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_open_and_read, args=(path, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert found == [list(range(500))] * 2
    assert [p.suffix for p in tmp_path.glob("index/*")] == [".index"]


def test_a_pickled_index_is_the_same(tmp_path: Path) -> None:
    index = open_index(write(tmp_path / "m.json", json.dumps([QA, PICTURE])), image=SPEC)
    stored = pickle.dumps(index)
    copy = pickle.loads(stored)
    assert len(stored) < 1000 and copy.raw(1) == PICTURE and copy.lengths.tolist() == index.lengths.tolist()


def test_a_file_that_may_not_be_read_is_a_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no folder that cannot be written, which is what the system's error alone would be told as."""
    path = write(tmp_path / "m.jsonl", json.dumps(QA))

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ConfigError, match=r"m\.jsonl cannot be read: Permission denied"):
        open_index(path)


def test_a_folder_that_takes_no_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "index", Path("/proc/nothing/index")):
        with pytest.raises(OSError, match="an index of the data goes into this folder: can output_dir be written") as found:
            write_arrays(folder / "lengths.npz", {})
        assert found.value.filename == str(folder) and code_of(found.value) == CANNOT_WRITE
