"""Laws of records in archives: what tarfile packs is found where it lies, the members of a key are one record, damage is named."""

from __future__ import annotations

import gzip
import io
import json
import mmap
import os
import pickle
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data.config import DataConfig, SourceConfig
from data.dataset import open_dataset
from data.index.record_index import RecordIndex
from data.index.tar_headers import ArchiveMap, Member, members
from data.media.blob import MediaError
from data.records.record import MediaRef, RecordError, parse
from model.errors import DataError
from model.media_spec import ImageSpec, MediaMeta, num_tokens
from tests.support.archive import content, pack
from tests.support.tiny_data import SPECS, dataset, grey, level, sample, talk, template

SPEC = ImageSpec(28, 14, 1, "patch", "exact", (0.5,) * 3, (0.5,) * 3)
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat on a mat."}]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def record(**more: Any) -> bytes:
    return json.dumps({"conversations": TURNS, **more}).encode()


def opened(path: Path, media_root: str = "") -> RecordIndex:
    return RecordIndex.open(SourceConfig(str(path), media_root=media_root), path.parent / "index", {"image": SPEC})


NAMES = st.lists(st.sampled_from(["a", "b.c", "ü漢", "d" * 60, "e" * 101, " f"]), min_size=1, max_size=5).map("/".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    files=st.dictionaries(NAMES, st.binary(max_size=1200), max_size=5),
    form=st.sampled_from(sorted(FORMATS)),
    dotted=st.booleans(),
)
def test_members_are_those_that_tarfile_packs(files: dict[str, bytes], form: str, dotted: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = pack(Path(folder, "m.tar"), {("./" if dotted else "") + name: files[name] for name in files}, FORMATS[form])
        except ValueError:  # too long a name for ustar
            return
        with path.open("rb") as file:
            data = ArchiveMap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = {member.name: data[member.start : member.start + member.size] for member in members(data, "m.tar")}
        assert found == files


def test_folders_and_links_are_passed_over_and_sizes_may_stand_in_pax(tmp_path: Path) -> None:
    path = tmp_path / "m.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}) as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.json"
            archive.addfile(info)
        info = tarfile.TarInfo("a.json")
        info.size, info.pax_headers = 8, {"size": "8", "note": "x" * 600}
        archive.addfile(info, io.BytesIO(b'{"a": 1}'))
    index = opened(path)
    assert len(index) == 1 and index.raw(0) == {"a": 1} and index.where(0) == "m.tar:a"


def test_the_members_of_a_key_are_one_record(tmp_path: Path) -> None:
    files = {
        "x/1.json": record(id="named", image="1.png"),
        "x/1.png": b"p1",
        "x/1.mask.png": b"mask",
        "x/2.jpg": b"first",
        "y/1.json": record(id="by path", image=["y/1.png", "1.b.png"]),
        "y/1.png": b"py",
        "y/1.b.png": b"pb",
        "x/2.json": record(id="unnamed\n"),
        "x/3.json": record(id="none", image=[]),
        "x/3.jpg": b"unused",
        "x/4.json": record(audio="4.wav", image="4.JPG").replace(b", ", b",\n "),
        "x/4.wav": b"w",
        "x/4.JPG": b"j",
        "x/4.txt": b"t",
        "._x.json": b"junk of another system",
        "README.md": b"not a record",
    }
    index = opened(pack(tmp_path / "m.tar", files))
    assert [index.where(i) for i in range(len(index))] == ["m.tar:x/1", "m.tar:x/2", "m.tar:y/1", "m.tar:x/3", "m.tar:x/4"]
    raws = [index.raw(i) for i in range(5)]
    assert [raw.get("image") for raw in raws] == ["1.png", ["x/2.jpg"], ["y/1.png", "1.b.png"], [], "4.JPG"]
    assert parse(raws[1], index.where(1)).media == (MediaRef("image", "x/2.jpg"),)
    assert content(index, 0, "image", "1.png") == b"p1" and content(index, 2, "image", "1.b.png") == b"pb"
    assert content(index, 2, "image", "y/1.png") == b"py" and content(index, 1, "image", "x/2.jpg") == b"first"
    assert content(index, 4, "audio", "4.wav") == b"w"
    blob = index.blob(1, MediaRef("image", "x/2.jpg"))
    assert blob is not None and blob.name == "m.tar:x/2.jpg" and blob.num_bytes() == 5 and blob.tail(3) == b"rst"
    # Planned with what it would have: an empty list cannot be told from no list here, and is the rarer one.
    text, image = 1 + 15 // 4, num_tokens(SPEC, MediaMeta())
    assert index.lengths.tolist() == [text + image, text + image, text + 2 * image, text + image, text + image]
    assert index.modalities.tolist() == [1, 1, 1, 1, 1 | 4]
    copy = pickle.loads(pickle.dumps(index))
    assert copy.raw(2) == raws[2] and content(copy, 4, "audio", "4.wav") == b"w"


def test_parts_that_name_a_path_need_nothing_added(tmp_path: Path) -> None:
    def said(part: dict[str, str]) -> bytes:
        turns = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "A."}]
        return json.dumps({"messages": turns}).encode()

    files = {"1.json": said({"type": "image", "path": "1.png"}), "1.png": b"1", "2.json": said({"type": "image"}), "2.png": b"2"}
    index = opened(pack(tmp_path / "m.tar", files))
    found = [parse(index.raw(i), index.where(i)).media for i in range(2)]
    assert found == [(MediaRef("image", "1.png"),), (MediaRef("image", "2.png"),)]


def test_shards_are_one_source(tmp_path: Path) -> None:
    for shard in range(3):
        files = [
            (f"{k}.{kind}", f"{shard}{k}".encode() if kind == "png" else record()) for k in range(2) for kind in ("json", "png")
        ]
        pack(tmp_path / f"{shard}.tar", files)
    index = opened(tmp_path / "*.tar")
    assert [index.where(i) for i in range(6)] == [f"{shard}.tar:{k}" for shard in range(3) for k in range(2)]
    assert [content(index, i, "image", f"{i % 2}.png") for i in range(6)] == [b"00", b"01", b"10", b"11", b"20", b"21"]


def test_a_medium_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "m.tar", [("a.json", record(image="b.png")), ("a.png", b"1"), ("a.png", b"2")])
    with pytest.raises(MediaError, match=r"^'b.png' is not in m.tar:a; media that stand elsewhere need the source's media_root$"):
        opened(path).blob(0, MediaRef("image", "b.png"))
    assert opened(path, str(tmp_path)).blob(0, MediaRef("image", "b.png")) is None
    with pytest.raises(MediaError, match=r"'a.png' is the name of 2 members of m.tar"):
        opened(path).blob(0, MediaRef("image", "a.png"))


def test_a_lost_or_broken_record_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    files = [("a.png", b"1"), ("b.json", b"{"), ("c.json", b""), ("d.json", b"{}"), ("d.json", b"{}"), ("e.json", record(id="e"))]
    index = opened(pack(tmp_path / "m.tar", files))
    messages = ["a a: json: no member is called a.json", "b b: json: cannot be decoded: ", "c c: json: cannot be decoded: "]
    for i, message in enumerate([*messages, "d d: json: 2 members are called d.json"]):
        with pytest.raises(RecordError, match=f"^m.tar:{message}"):
            index.raw(i)
    assert index.raw(4)["id"] == "e" and len(index) == 5 and index.lengths.min() >= 1


def sound() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder, "m.tar"), {"a.json": record(), "a.png": b"x" * 2000}).read_bytes()


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = sound()
    end = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512
    flipped = bytearray(whole)
    flipped[1030] ^= 1
    cases = {
        "byte 0: no header of a member, or a damaged one": b"\1" + whole[1:],
        "byte 1024: no header of a member, or a damaged one": bytes(flipped),
        "byte 1024: the archive is cut short in what begins here": whole[:2000],
        f"byte {end}: the archive is cut short: its end mark is missing": whole[:end],
        "there is more after the end mark": whole + whole,
        "the archive is compressed": gzip.compress(whole),
        "is empty; expected at least one record": b"",
        "holds no record; a record is a member KEY.json": bytes(10240),
    }
    for number, (message, damaged) in enumerate(cases.items()):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            opened(path)
        assert message in str(caught.value) and str(path) in str(caught.value)
    assert not os.path.exists(tmp_path / "index")


def test_no_byte_of_a_header_can_be_flipped_unseen(tmp_path: Path) -> None:
    whole, path = sound(), tmp_path / "m.tar"

    def read(archive: bytes) -> list[Member] | None:
        path.write_bytes(archive)
        with path.open("rb") as file:
            try:
                return list(members(ArchiveMap(file.fileno(), 0, access=mmap.ACCESS_READ), "m.tar"))
            except DataError:
                return None

    found = [read(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]) for at in range(512)]
    # A leading zero of the checksum becomes a space, and the space behind it is not read: both say the same.
    assert [(at, one) for at, one in enumerate(found) if one is not None] == [(at, read(whole)) for at in (148, 155)]


def test_what_a_header_names_too_much_of_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Sizes below zero, which would lead backwards for ever, and headers of names that take gigabytes."""

    def archive(size: str, kind: bytes = tarfile.REGTYPE, pax_size: str = "") -> bytes:
        info = tarfile.TarInfo("a.json")
        info.type, info.pax_headers = kind, {"size": pax_size} if pax_size else {}
        header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
        own = memoryview(header)[-512:]
        own[124:136] = size.encode().ljust(12, b"\0")
        own[148:156] = b" " * 8
        own[148:156] = b"%06o\0 " % sum(own)
        return bytes(header) + bytes(10240)

    path = tmp_path / "m.tar"
    cases = [(archive("0", pax_size=size), f"size '{size}'") for size in ("-600", "8x")] + [(archive("-1300"), "size '-704'")]
    cases += [(archive("17777777777", kind), "at most 1048576 are read") for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)]
    for damaged, message in cases:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"byte 0: .*{message}"):
            opened(path)


def test_a_sample_is_the_same_wherever_its_picture_lies(tmp_path: Path) -> None:
    names = [grey(tmp_path, shade) for shade in (10, 200)]
    records = [talk("<image>\nWhat?", "A cat.", images=names[0], id="0"), talk("Who?", "I.", images=names[1], id="1")]
    lines = dataset(tmp_path, records)
    files = [(f"{k}.json", json.dumps(record).encode()) for k, record in enumerate(records)]
    pictures = [(tmp_path / name).read_bytes() for name in names]
    # Its name in the archive is what the record says, its key is the record's.
    files = [(name.replace("0.json", "10.json").replace("1.json", "200.json"), content) for name, content in files]
    pack(tmp_path / "m.tar", files + list(zip(names, pictures)))
    columns = {"conversations": [record["conversations"] for record in records]}
    columns["image"] = [{"bytes": content, "path": name} for content, name in zip(pictures, names)]
    parquet.write_table(pyarrow.table(columns), tmp_path / "m.parquet")
    for name in ("m.tar", "m.parquet"):
        other = open_dataset((SourceConfig(str(tmp_path / name)),), DataConfig(), template(), SPECS, tmp_path / "index")
        assert other.lengths.tolist() == lines.lengths.tolist()
        for i, shade in enumerate((10, 200)):
            ours, expected = sample(other, i), sample(lines, i)
            assert ours.input_ids.tolist() == expected.input_ids.tolist()
            assert level(ours.media["image"][0].values[0]) == level(expected.media["image"][0].values[0]) == shade
