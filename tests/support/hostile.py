"""A corpus of what reaches a trainer in practice: records and files that are wrong, each in one way, and what must be said."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.tiny_media import wav

Kind = tuple[bytes, str]
"""A line of a .jsonl file, and words of the reason for which it is not trained on."""


def record(image: Any = None, question: str | None = None, answer: Any = "It is a cat.", **fields: Any) -> bytes:
    """A record that is sound but for what is given."""
    question = question if question is not None else "<image>\nWhat is this?" if image is not None else "What is this?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    value = {"conversations": turns, **({} if image is None else {"image": image}), **fields}
    return json.dumps({key: item for key, item in value.items() if item is not ...}).encode()


def schema_kinds() -> dict[str, Kind]:
    """Lines that are no records."""
    human, gpt = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
    return {
        "cut JSON": (b'{"id": "x", "conversations": [', "cannot be decoded"),
        "a number": (b"42", "is a number, not an object"),
        "a list": (b"[1]", "is a list, not an object"),
        "null": (b"null", "is a null, not an object"),
        "no UTF-8": (b'{"id": "\xff\xfe"}', "cannot be decoded"),
        "half a surrogate": (record(question="\ud800"), "half of a surrogate pair"),
        "nested too deep": (b"[" * 100_000 + b"]" * 100_000, "cannot be decoded"),
        "no turns": (record(conversations=...), "conversations: missing"),
        "empty turns": (record(conversations=[]), "is empty"),
        "two spellings": (record(messages=[{"role": "user", "content": "Hi"}]), "both conversations and messages"),
        "turns are text": (record(conversations="Hi"), "is a string, not a list of turns"),
        "a turn is text": (record(conversations=["Hi", "Hello"]), "is a string, not an object"),
        "unknown role": (record(conversations=[{"from": "robot", "value": "Hi"}, gpt]), "'robot' is no role"),
        "a value is a number": (record(answer=7), "is a number, not a string"),
        "a value is null": (record(answer=None), "is a null, not a string"),
        "empty answer": (record(answer=""), "is an empty answer"),
        "blank answer": (record(answer=" \n\t"), "is an empty answer"),
        "no answer": (record(conversations=[human]), "an answer must come last"),
        "two questions": (record(conversations=[human, human, gpt]), "turn 2 is the user's"),
        "nothing but an answer": (record(conversations=[gpt]), "no turn is left"),
        "reserved character": (record(question="\ue100"), "U+E100"),
        "id is a list": (record(id=[1]), "id: is a list"),
        "unknown content part": (
            record(
                conversations=...,
                messages=[{"role": "user", "content": [{"type": "smell"}]}, {"role": "assistant", "content": "b"}],
            ),
            "type 'smell'",
        ),
        "longer than max_length": (record(answer="word " * 1_000), "the first round takes"),
        "clip state without a clip": (record(audio_state=1), "audio_state"),
        "interrupted without a clip": (record(end_tag=False), "end_tag"),
        "reply to noise without a clip": (record(inserted_id=1), "inserted_id"),
    }


def placeholder_kinds() -> dict[str, Kind]:
    """Placeholders and media that disagree, and media that are no paths. The picture sound.png is there."""
    return {
        "more placeholders than files": (record("sound.png", "<image><image>"), "2 <image> in the turns, 1 image files"),
        "more files than placeholders": (record(["sound.png"] * 2, "<image>"), "1 <image> in the turns, 2 image files"),
        "placeholder without a file": (record(question="<image>"), "1 <image> in the turns, 0 image files"),
        "placeholder in an answer": (record("sound.png", answer="<image>"), "media cannot stand in an answer"),
        "more pictures than max_images": (record(["sound.png"] * 5, "<image>" * 5), "data.max_images allows 4"),
        "path is a number": (record(7), "is a number, not a path"),
        "path is empty": (record(""), "empty path"),
        "a path is null": (record(["sound.png", None], "<image><image>"), "is a null, not a path"),
        "web address": (record("https://example.org/a.png"), "is a URL"),
        "data address without base64": (record("data:image/png,AAAA"), "is a URL"),
        "data address of broken base64": (record("data:image/png;base64,A*"), "the data URI cannot be decoded"),
        "data address of no picture": (record("data:image/png;base64,AAAA"), "data URI of 3 bytes"),
    }


def path_kinds(root: Path) -> dict[str, Kind]:
    """Files that are not there, are not files, or stand outside `root`."""
    outside = root.parent / "outside.png"
    Image.new("RGB", (20, 20)).save(outside)
    os.symlink(outside, root / "link.png")
    os.symlink(root / "loop.png", root / "loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    return {
        "missing file": (record("gone.png"), "does not exist"),
        "absolute path": (record(str(outside)), "is absolute"),
        "path out of the root": (record("../outside.png"), "leaves media_root"),
        "link out of the root": (record("link.png"), "data.follow_links"),
        "link to itself": (record("loop.png"), "loop.png"),
        "pipe": (record("pipe.png"), "is not a regular file"),
        "folder": (record("folder.png"), "is not a regular file"),
        "null character in a path": (record("a\0.png"), "null character"),
        "half a surrogate in a path": (record("\ud800.png"), "image: '\\ud800.png' holds half of a surrogate pair"),
        "path of 5,000 characters": (record("a" * 5000), "aaaa"),
    }


def picture_kinds(root: Path) -> dict[str, Kind]:
    """Files that are no sound pictures."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    named: dict[str, Callable[[Path], object]] = {
        "cut.jpg": lambda file: cut(noise, file),
        "cut.png": lambda file: cut(noise, file),
        "cut.gif": lambda file: cut(noise, file),
        "cut.webp": lambda file: cut(noise, file),
        "cut.bmp": lambda file: cut(noise, file),
        "empty.png": lambda file: file.write_bytes(b""),
        "text.jpg": lambda file: file.write_text("not a picture"),
        "tiff.png": lambda file: noise.save(file, "TIFF"),
        "bomb.png": lambda file: file.write_bytes(png(30_000, 30_000)),
        "flat.png": lambda file: file.write_bytes(png(0, 10)),
        "strip.png": lambda file: file.write_bytes(png(1, 60_000_000)),
        "damaged.png": lambda file: damaged(noise, file),
        "header.png": lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n"),
    }
    expected = {"bomb.png": "data.max_pixels allows", "strip.png": "so narrow"}
    for name, write in named.items():
        write(root / name)
    return {f"picture {name}": (record(name), expected.get(name, name)) for name in named}


def video_kinds(root: Path) -> dict[str, Kind]:
    """Videos that are not there, are broken, or are watched where they have nothing. film.gif lasts 0.4 seconds."""
    greys = [Image.new("RGB", (20, 20), (60 * i,) * 3) for i in range(4)]
    greys[0].save(root / "film.gif", save_all=True, append_images=greys[1:], duration=100)
    (root / "cut_film.gif").write_bytes((root / "film.gif").read_bytes()[:-40])
    (root / "text.mp4").write_text("not a film")
    for folder, content in (("no_frames", "times.txt"), ("bad_frame", "1.png")):
        (root / folder).mkdir()
        (root / folder / content).write_text("0.0")
    return {
        "missing video": (film("gone.mp4"), "does not exist"),
        "video out of the root": (film("../outside.png"), "leaves media_root"),
        "cut video": (film("cut_film.gif"), "cut_film.gif"),
        "text named as a video": (film("text.mp4"), "text.mp4"),
        "folder without frames": (film("no_frames"), "is a folder without frames"),
        "folder with a frame that is text": (film("bad_frame"), "bad_frame/1.png' is none of"),
        "range that runs backwards": (film("film.gif", [0.3, 0.1]), "the end must come later"),
        "range behind the end": (film("film.gif", [7, 8]), "is not in '"),
        "range that ends far behind the end": (film("film.gif", [0, 60]), "which lasts 0.40 s"),
        "range before the start": (film("film.gif", [-1, 0.2]), "is no [start, end] in seconds"),
        "range of no numbers": (film("film.gif", ["0:00", "0:01"]), "is no [start, end] in seconds"),
        "two ranges of one video": (film("film.gif", [[0, 0.1], [0.2, 0.3]]), "2 ranges, 1 videos"),
        "range without a video": (record("sound.png", video_range=[0, 1]), "1 ranges, 0 videos"),
    }


def film(path: str, span: Any = ...) -> bytes:
    return record(question="<video>\nWhat happens?", video=path, video_range=span)


def sound_kinds(root: Path) -> dict[str, Kind]:
    """Clips that are no sound ones; sound.wav is. They need a part that hears."""
    quiet = np.full((1600, 1), 0.1, dtype=np.float32)
    nan, loud = quiet.copy(), quiet * 32_768
    nan[800] = np.nan
    whole = wav(quiet, 16_000)
    contents = {
        "gone.wav": (None, "does not exist"),
        "cut.wav": (whole[: len(whole) // 2], "it is cut off"),
        "cut_header.wav": (whole[:30], "is a WAV file without samples"),
        "zero.wav": (wav(quiet[:0], 16_000), "holds no samples"),
        "nan.wav": (wav(nan, 16_000, 32, is_float=True), "1 samples that are no finite number"),
        "loud.wav": (wav(loud, 16_000, 32, is_float=True), "without being scaled to it"),
        "absurd_rate.wav": (wav(quiet, 16_000, told_rate=2**32 - 1), "4294967295 samples per second"),
        "no_rate.wav": (wav(quiet, 16_000, told_rate=0), "0 samples per second"),
        "absurd_channels.wav": (wav(quiet, 16_000, told_channels=65_535), "absurd_channels.wav"),
        "absurd_size.wav": (wav(quiet, 16_000, size=2**32 - 2), "declares 4294967294 bytes of samples"),
        "long.wav": (wav(np.zeros((3_100, 1), dtype=np.float32), 1_000), "lasts 3.10 s; data.max_seconds allows 3"),
        "text.wav": (b"not a sound", "text.wav"),
        "empty.wav": (b"", "empty.wav"),
        "picture.wav": (png(20, 20), "picture.wav"),
    }
    (root / "sound.wav").write_bytes(whole)
    for name, (content, _) in contents.items():
        if content is not None:
            (root / name).write_bytes(content)
    return {f"clip {name}": (clip(name), words) for name, (_, words) in contents.items()}


def clip(path: str) -> bytes:
    return record(question="<audio>", audio=path)


def cut(picture: Image.Image, file: Path) -> None:
    """The first half of a file."""
    picture.save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damaged(picture: Image.Image, file: Path) -> None:
    """A file of the right length whose compressed bytes are wrong in the middle."""
    picture.save(file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    file.write_bytes(bytes(content))


def png(width: int, height: int) -> bytes:
    """A file of a few bytes that declares this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def hostile(root: Path) -> dict[str, Kind]:
    """Every kind that a model which only sees can meet, by name; their files are written into `root`."""
    Image.new("RGB", (20, 20), "red").save(root / "sound.png")
    return {**schema_kinds(), **placeholder_kinds(), **path_kinds(root), **picture_kinds(root), **video_kinds(root)}
