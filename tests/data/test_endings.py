"""Files that are cut short are found by their markers; whole ones pass, with whatever stands behind their end."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.media import image_decode
from data.media.blob import Blob, MediaError
from data.media.image import check_file


def noise(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(kind: str, picture: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (picture or noise()).save(buffer, kind, **options)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds a whole little JPEG."""
    plain, small = encoded("JPEG"), encoded("JPEG", noise(16, 16))
    block = b"Exif\0\0" + small
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


WHOLE: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded("JPEG"),
    "progressive": lambda: encoded("JPEG", progressive=True),
    "grey": lambda: encoded("JPEG", noise().convert("L")),
    "thumbnail": with_thumbnail,
    "mpo": lambda: encoded("MPO", save_all=True, append_images=[noise(seed=1)]),
    "png": lambda: encoded("PNG"),
    "apng": lambda: encoded("PNG", save_all=True, append_images=[noise(seed=1)]),
    "gif": lambda: encoded("GIF"),
    "animation": lambda: encoded("GIF", save_all=True, append_images=[noise(seed=1), noise(seed=2)], duration=10),
    "webp": lambda: encoded("WEBP"),
    "lossless": lambda: encoded("WEBP", lossless=True),
    "bmp": lambda: encoded("BMP"),
    "bmp with a palette": lambda: encoded("BMP", noise(61).convert("P")),
    "bmp of one bit": lambda: encoded("BMP", noise(61).convert("1")),
}

ONLY_DECODED = ("bmp", "bmp with a palette", "bmp of one bit")
"""Formats whose ends are not looked for: check_data finds them cut short with --decode alone."""


def whole(name: str, data: bytes) -> bool:
    try:
        check_file(Blob(name, data=data))
    except MediaError as error:
        assert repr(name) in str(error)
        return False
    return True


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_pass_and_cut_ones_do_not(name: str) -> None:
    data = WHOLE[name]()
    assert whole(name, data)
    assert whole(name, data + b"\0" * 9000) and whole(name, data + b"a film of a phone" * 1000)
    if name in ONLY_DECODED:
        assert not whole(name, data[:20])
        for length in (len(data) // 4, len(data) // 2):
            with pytest.raises(MediaError):
                image_decode.decode(Blob(name, data=data[:length]), lambda size: None)
        return
    # What ends a JPEG may stand before the further pictures of an MPO.
    last = data.index(b"\xff\xd9") + 1 if name == "mpo" else len(data) - 1
    for length in [*range(1, last, max(len(data) // 150, 1)), last]:
        assert not whole(name, data[:length]), length


def test_a_cut_file_that_passes_has_all_pixels_of_its_first_picture() -> None:
    """Of an MPO, whose further pictures nobody reads: of every other format no cut file passes."""
    data = WHOLE["mpo"]()
    passed = [length for length in range(len(data) // 2, len(data), len(data) // 100) if whole("mpo", data[:length])]
    assert len(passed) > 10
    with Image.open(io.BytesIO(data)) as picture:
        expected = picture.tobytes()
    for length in passed:
        with Image.open(io.BytesIO(data[:length])) as picture:
            assert picture.tobytes() == expected


def test_half_a_jpeg_is_found_which_verify_lets_pass(tmp_path: Path) -> None:
    data = encoded("JPEG", noise(800, 600))
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "a.jpg") as picture:
        picture.verify()
    with pytest.raises(MediaError, match="end-of-image marker is missing"):
        check_file(Blob("a.jpg", str(tmp_path / "a.jpg")))


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOT_PICTURES = {
    "empty": (b"", "is empty: it has 0 bytes"),
    "a page": (b"<!DOCTYPE html><html>", "none of JPEG, PNG, WEBP, GIF, BMP: it begins with b'<!DOCTYPE ht'"),
    "no width": (png_of(0, 5), "begins as PNG, but its header is broken, cut short or of no pixels"),
    "no height": (png_of(5, 0), "begins as PNG, but its header is broken, cut short or of no pixels"),
    "a flat gif": (b"GIF89a" + struct.pack("<HH", 0, 7) + b"\0\0\0;", "begins as GIF, but its header is broken"),
    "a flat bmp": (
        WHOLE["bmp"]().replace(struct.pack("<ii", 64, 48), struct.pack("<ii", 64, 0)),
        "begins as BMP, but its header is broken",
    ),
    "a jpeg that goes round": (b"\xff\xd8\xff\xe0\0\0" + b"\xff\xe0\0\0" * 20, "cannot be decoded"),
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_what_is_no_picture_is_named(name: str) -> None:
    data, reason = NOT_PICTURES[name]
    with pytest.raises(MediaError, match=reason):
        check_file(Blob(name, data=data))


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="not a regular file"):
        check_file(Blob("folder", str(tmp_path)))
    with pytest.raises(MediaError, match="does not exist"):
        check_file(Blob("lost", str(tmp_path / "lost")))


def test_a_member_of_an_archive_is_judged_by_its_own_bytes(tmp_path: Path) -> None:
    first, second = encoded("JPEG"), encoded("JPEG", noise(seed=1))
    (tmp_path / "a.tar").write_bytes(first + second)
    check_file(Blob("first", str(tmp_path / "a.tar"), 0, len(first)))
    with pytest.raises(MediaError, match="end-of-image marker is missing"):
        check_file(Blob("first", str(tmp_path / "a.tar"), 0, len(first) - 2))
