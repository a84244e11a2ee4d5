"""Ways in which a checkpoint comes to be wrong, each drawn at random: what disks, copies, and people do to files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files.manifest import NAME
from model.files.tensor_files import dump_json


@dataclass(frozen=True)
class Others:
    """Sound checkpoints that damage is made of, all of the same ranks."""

    earlier: Path  # of the same run, another step
    stranger: Path  # of another run, the same step


Damage = Callable[[random.Random, Path, Others], str]


def corrupt(draw: random.Random, folder: Path, others: Others) -> str:
    """Damage the checkpoint `folder` in one way; what was done. Files are replaced, not written into: they may have other links."""
    kind = draw.choice(list(KINDS))
    return f"{kind}: {KINDS[kind](draw, folder, others)}"


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def file_of(draw: random.Random, folder: Path, least: int = 1) -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.stat().st_size >= least))


def differing(draw: random.Random, folder: Path, other: Path) -> Path:
    """A file of `folder` that `other` has with other bytes."""
    names = [path.name for path in sorted(folder.iterdir()) if (other / path.name).read_bytes() != path.read_bytes()]
    return folder / draw.choice(names)


def flip(draw: random.Random, folder: Path, others: Others) -> str:
    path = file_of(draw, folder)
    data = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    replaced(path, bytes(data))
    return f"bit {bit} of byte {place} of {path.name}"


def cut(draw: random.Random, folder: Path, others: Others) -> str:
    path = file_of(draw, folder)
    size = draw.choice([0, path.stat().st_size - 1, draw.randrange(path.stat().st_size)])
    replaced(path, path.read_bytes()[:size])
    return f"{path.name} to {size} bytes"


def grow(draw: random.Random, folder: Path, others: Others) -> str:
    path = file_of(draw, folder)
    more = draw.choice([b"\n", b" ", b"\0", b"\0" * 512, draw.randbytes(draw.randrange(1, 64))])
    replaced(path, path.read_bytes() + more)
    return f"{path.name} by {more!r}"


def zero(draw: random.Random, folder: Path, others: Others) -> str:
    """A block that the disk never got, as after a power cut."""
    path = file_of(draw, folder, 64)
    data = bytearray(path.read_bytes())
    first = draw.randrange(len(data) - 32)
    last = draw.choice([len(data), min(len(data), first + 512)])
    if not any(data[first:last]):
        first, last = 0, len(data)
    data[first:last] = bytes(last - first)
    replaced(path, bytes(data))
    return f"bytes {first} to {last} of {path.name}"


def shuffle(draw: random.Random, folder: Path, others: Others) -> str:
    """Two halves of a file in each other's place: the same bytes, the same size."""
    path = file_of(draw, folder, 64)
    data = path.read_bytes()
    half = draw.randrange(1, len(data) // 2)
    replaced(path, data[half:] + data[:half])
    return f"{path.name} at {half}"


def delete(draw: random.Random, folder: Path, others: Others) -> str:
    paths = draw.sample(sorted(folder.iterdir()), draw.randrange(1, 4))
    for path in paths:
        path.unlink()
    return ", ".join(path.name for path in paths)


def delete_all(draw: random.Random, folder: Path, others: Others) -> str:
    kept = draw.choice(["", NAME])
    for path in folder.iterdir():
        if path.name != kept:
            path.unlink()
    return f"but {kept or 'none'}"


def add(draw: random.Random, folder: Path, others: Others) -> str:
    path = folder / draw.choice(["rank-00002-of-00003.safetensors", "extra.json", ".hidden", "manifest.json.bak"])
    if draw.random() < 0.3:
        path.mkdir()
    else:
        path.write_bytes(draw.randbytes(draw.randrange(20)))
    return path.name


def rename(draw: random.Random, folder: Path, others: Others) -> str:
    path = file_of(draw, folder)
    path.rename(path.with_name(path.name + draw.choice(["~", ".1", ".part"])))
    return path.name


def swap(draw: random.Random, folder: Path, others: Others) -> str:
    one = file_of(draw, folder)
    other = draw.choice([path for path in sorted(folder.iterdir()) if path.read_bytes() != one.read_bytes()])
    ours, theirs = one.read_bytes(), other.read_bytes()
    replaced(one, theirs)
    replaced(other, ours)
    return f"{one.name} and {other.name}"


def swap_tensors(draw: random.Random, folder: Path, others: Others) -> str:
    """Two tensors of one shape in each other's place, inside one file."""
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    table = {name: entry["data_offsets"] for name, entry in json.loads(data[8 : 8 + length]).items() if name != "__metadata__"}
    while True:
        one, other = draw.sample(sorted(table), 2)
        (a, b), (c, d) = ((8 + length + x, 8 + length + y) for x, y in (table[one], table[other]))
        if b - a == d - c and data[a:b] != data[c:d]:
            break
    data[a:b], data[c:d] = data[c:d], data[a:b]
    replaced(path, bytes(data))
    return f"{one} and {other} of {path.name}"


def stale(draw: random.Random, folder: Path, others: Others) -> str:
    """A copy of an older checkpoint under this one's name, or this one as a newer step."""
    shutil.rmtree(folder)
    shutil.copytree(others.earlier, folder)
    return others.earlier.name


def mixed(draw: random.Random, folder: Path, others: Others) -> str:
    """Files of another step or of another run among this one's; sizes are the same as a rule."""
    other = draw.choice([others.earlier, others.stranger])
    first = differing(draw, folder, other)
    paths = {first, *draw.sample(sorted(folder.iterdir()), draw.randrange(0, 4))}
    if not any(path.read_bytes() != (other / path.name).read_bytes() for path in folder.iterdir() if path not in paths):
        paths = {first}
    for path in paths:
        replaced(path, (other / path.name).read_bytes())
    return f"{sorted(path.name for path in paths)} of {other.parent.name}/{other.name}"


def old_manifest(draw: random.Random, folder: Path, others: Others) -> str:
    other = draw.choice([others.earlier, others.stranger])
    replaced(folder / NAME, (other / NAME).read_bytes())
    return f"of {other.parent.name}/{other.name}"


def edit_manifest(draw: random.Random, folder: Path, others: Others) -> str:
    """A number, a checksum or a name changed by hand, its digest left as it was or, half of the time, made to fit."""
    manifest = json.loads((folder / NAME).read_bytes())
    name = draw.choice(sorted(manifest["files"]))
    facts = manifest["files"][name]
    kind, edit = draw.choice(edits(draw, manifest, name, facts))
    edit()
    if draw.random() < 0.5 and kind not in ("digest", "run id"):
        body = {key: value for key, value in manifest.items() if key != "digest"}
        manifest["digest"] = hashlib.sha256(dump_json(body).encode()).hexdigest()
        kind += ", with its digest"
    replaced(folder / NAME, dump_json(manifest).encode())
    return f"{kind} of {name}"


def edits(draw: random.Random, manifest: dict[str, Any], name: str, facts: dict[str, Any]) -> list[tuple[str, Callable[[], Any]]]:
    files = manifest["files"]
    digit = draw.choice([c for c in "0123456789abcdef" if c != facts["sha256"][0]])
    other = draw.choice([other for other in sorted(files) if other != name])
    outside = draw.choice(["../x", "/etc/hostname", "a/b", "..", "", "."])
    wrong = draw.choice([None, [], "7", -1, 1e30, True, {}, float(10**300)])
    return [
        ("step", lambda: manifest.update(step=manifest["step"] + draw.choice([-1, 1, 100]))),
        ("run id", lambda: manifest.update(run_id="0" * 32)),
        ("digest", lambda: manifest.update(digest="0" * 64)),
        ("size", lambda: facts.update(size=facts["size"] + 1)),
        ("checksum", lambda: facts.update(sha256=digit + facts["sha256"][1:])),
        ("facts exchanged", lambda: files.update({name: files[other], other: files[name]})),
        ("left out", lambda: files.pop(name)),
        ("named outside", lambda: files.update({outside: files.pop(name)})),
        ("added outside", lambda: files.update({outside: dict(facts)})),
        ("wrong type of size", lambda: facts.update(size=wrong)),
        ("wrong type of checksum", lambda: facts.update(sha256=wrong)),
        ("wrong type of facts", lambda: files.update({name: wrong})),
        ("wrong type of files", lambda: manifest.update(files=wrong)),
        ("wrong type of step", lambda: manifest.update(step=wrong)),
    ]


def odd_manifest(draw: random.Random, folder: Path, others: Others) -> str:
    """Something that is no manifest, or the same one spelt in another way."""
    data = (folder / NAME).read_bytes()
    odd = draw.choice(
        [
            b"null",
            b"[]",
            b"7",
            b"{}",
            b'"x"',
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"9" * 10_000,
            data.replace(b"\n", b"\r\n"),
            b"\xef\xbb\xbf" + data,
            data.replace(b'"step"', b'"step": 1, "step"', 1),
            json.dumps(json.loads(data)).encode(),
        ]
    )
    replaced(folder / NAME, odd)
    return repr(odd[:20])


def link(draw: random.Random, folder: Path, others: Others) -> str:
    """A symbolic link in place of a file, to the same bytes elsewhere; or to nothing, or to itself."""
    path = file_of(draw, folder)
    outside = folder.parent / f"outside-{folder.name}-{path.name}"
    shutil.copy2(path, outside)
    target = draw.choice([str(outside), "/dev/null", "nowhere", path.name])
    path.unlink()
    path.symlink_to(target)
    return f"{path.name} to {target}"


def link_folder(draw: random.Random, folder: Path, others: Others) -> str:
    outside = folder.parent / f"outside-{folder.name}"
    folder.rename(outside)
    folder.symlink_to(outside)
    return ""


def other_kind(draw: random.Random, folder: Path, others: Others) -> str:
    """A folder or a named pipe where a file was: whoever opens the pipe waits for ever."""
    path = file_of(draw, folder)
    path.unlink()
    if draw.random() < 0.5:
        path.mkdir()
        return f"a folder, {path.name}"
    os.mkfifo(path)
    return f"a pipe, {path.name}"


KINDS: dict[str, Damage] = {
    "flipped": flip,
    "cut": cut,
    "grown": grow,
    "zeroed": zero,
    "shuffled": shuffle,
    "deleted": delete,
    "all deleted": delete_all,
    "added": add,
    "renamed": rename,
    "files exchanged": swap,
    "tensors exchanged": swap_tensors,
    "stale folder": stale,
    "mixed": mixed,
    "another manifest": old_manifest,
    "edited manifest": edit_manifest,
    "odd manifest": odd_manifest,
    "linked": link,
    "linked folder": link_folder,
    "another kind of file": other_kind,
}
