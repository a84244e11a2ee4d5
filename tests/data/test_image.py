"""Pixels equal the Hugging Face processors to the bit; nothing outside the root, the formats or the limits is opened."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import load_image

from data.config import DataConfig
from data.media import image
from data.media.blob import Blob, MediaError, resolve_path
from data.media.image_decode import Picture
from data.records.record import MediaRef
from model.media_spec import ImageSpec
from tests.support.pictures import CLIP, SIGLIP, SIZES, encoded, loaded, noise

SIDES = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
CLIP_PROCESSOR, LLAVA = CLIPImageProcessorPil(**SIDES), LlavaImageProcessorPil(do_pad=True, **SIDES)
SIGLIP_PROCESSOR = SiglipImageProcessorPil(size={"height": 30, "width": 30})


def saved(folder: Path, picture: Image.Image, name: str = "a.png", **options: object) -> str:
    picture.save(folder / name, **options)
    return name


def load(folder: Path, name: str, spec: ImageSpec = CLIP, fit: str = "pad", max_pixels: int = 10**6, links: bool = False) -> Tensor:
    path = resolve_path(name, str(folder), follow_links=links)
    return decoded(path, spec, fit, max_pixels)


def decoded(path: str, spec: ImageSpec, fit: str, max_pixels: int) -> Tensor:
    """Pixels (3, S, S) of the one view of a picture."""
    blob, ref = Blob(path, path), MediaRef("image", path)
    config = DataConfig(image_fit=fit, max_pixels=max_pixels)  # type: ignore[arg-type]
    return image.load(blob, ref, spec, config, image.measure(blob, ref, spec, config, 1))[0]


def reference(processor: object, picture: Image.Image) -> Tensor:
    return processor(picture, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["pad", "square"])
def test_clip_and_llava_to_the_bit(tmp_path: Path, size: tuple[int, int], fit: str) -> None:
    ours = load(tmp_path, saved(tmp_path, noise(size)), CLIP, fit)
    assert ours.shape == (3, 30, 30) and ours.dtype == torch.float32
    assert torch.equal(ours, reference(LLAVA if fit == "pad" else CLIP_PROCESSOR, noise(size)))


@pytest.mark.parametrize("size", SIZES)
def test_siglip_to_the_bit(tmp_path: Path, size: tuple[int, int]) -> None:
    ours = load(tmp_path, saved(tmp_path, noise(size)), SIGLIP, "square")
    assert torch.equal(ours, reference(SIGLIP_PROCESSOR, noise(size)))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 150), height=st.integers(1, 150), fit=st.sampled_from(["pad", "square"]), seed=st.integers(0, 9))
def test_any_size_to_the_bit(width: int, height: int, fit: str, seed: int) -> None:
    picture = noise((width, height), seed=seed)
    ours = loaded(encoded(picture, "PNG"), CLIP, image_fit=fit)
    assert torch.equal(ours, reference(LLAVA if fit == "pad" else CLIP_PROCESSOR, picture))


MODES = [("L", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG")]
MODES += [("RGBA", "WEBP"), ("P", "GIF"), ("P", "BMP")]


@pytest.mark.parametrize("mode,kind", MODES)
@pytest.mark.parametrize("fit,processor", [("pad", LLAVA), ("square", CLIP_PROCESSOR)])
def test_every_mode_as_load_image_converts_it(tmp_path: Path, mode: str, kind: str, fit: str, processor: object) -> None:
    saved(tmp_path, noise((40, 33), mode), "a", format=kind)
    with Image.open(tmp_path / "a") as stored:
        assert stored.mode == mode
    assert torch.equal(load(tmp_path, "a", CLIP, fit), reference(processor, load_image(str(tmp_path / "a"))))


def test_transparency_of_a_palette_is_dropped_too(tmp_path: Path) -> None:
    saved(tmp_path, noise((40, 33), "P"), transparency=7)
    assert torch.equal(load(tmp_path, "a.png"), reference(LLAVA, load_image(str(tmp_path / "a.png"))))


def test_sixteen_bits_keep_their_high_bytes(tmp_path: Path) -> None:
    deep = noise((40, 33), "I;16")
    high = Image.fromarray((np.asarray(deep) >> 8).astype(np.uint8))
    ours = load(tmp_path, saved(tmp_path, deep))
    assert torch.equal(ours, load(tmp_path, saved(tmp_path, high, "b.png")))
    assert len(ours.unique()) > 100  # where Pillow's own conversion would make nearly all of it white


def test_padding_is_the_mean_colour_around_the_centred_picture(tmp_path: Path) -> None:
    pixels = load(tmp_path, saved(tmp_path, Image.new("RGB", (30, 10), "white")))
    colour = torch.tensor([int(m * 255) / 255 for m in CLIP.mean])
    expected = (colour - torch.tensor(CLIP.mean)) / torch.tensor(CLIP.std)
    torch.testing.assert_close(pixels[:, 0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels[:, 29, 29], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels[:, 15, 15], (1 - torch.tensor(CLIP.mean)) / torch.tensor(CLIP.std), atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_pictures_are_upright_as_load_image_turns_them(tmp_path: Path, orientation: int, name: str) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    saved(tmp_path, noise((50, 33)), name, exif=tag)
    upright = load_image(str(tmp_path / name))
    assert upright.size == ((33, 50) if orientation >= 5 else (50, 33))
    assert torch.equal(load(tmp_path, name, CLIP, "pad"), reference(LLAVA, upright))
    assert torch.equal(load(tmp_path, name, CLIP, "square"), reference(CLIP_PROCESSOR, upright))


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path, orientation: int) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    early = encoded(noise((50, 33)), "PNG", exif=tag)
    start = early.index(b"eXIf") - 4
    chunk = early[start : start + 12 + int.from_bytes(early[start : start + 4], "big")]
    late = early.replace(chunk, b"").replace(early[-12:], chunk + early[-12:])
    (tmp_path / "a.png").write_bytes(late)
    assert late != early and load_image(str(tmp_path / "a.png")).size == ((33, 50) if orientation == 6 else (50, 33))
    assert torch.equal(load(tmp_path, "a.png"), loaded(early, CLIP))
    blob = Blob("a.png", str(tmp_path / "a.png"))
    assert image.size(blob, CLIP, DataConfig()) == load_image(str(tmp_path / "a.png")).size


@pytest.mark.parametrize("exif", [b"", b"garbage!!!!", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_orientation_that_cannot_be_read_is_none(exif: bytes) -> None:
    picture = noise((50, 33))
    assert torch.equal(loaded(encoded(picture, "JPEG", exif=b"Exif\0\0" + exif), CLIP), loaded(encoded(picture, "JPEG"), CLIP))


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (30, 30), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue], duration=10)
    assert torch.equal(load(tmp_path, "a.gif"), load(tmp_path, saved(tmp_path, red)))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "lossless": True}])
def test_a_file_cut_short_is_an_error_wherever_pixels_are_missing(tmp_path: Path, name: str, options: dict[str, bool]) -> None:
    saved(tmp_path, noise((64, 64)), name, **options)
    whole, pixels = (tmp_path / name).read_bytes(), load(tmp_path, name)
    for length in [*range(1, len(whole) - 20, len(whole) // 40), *range(len(whole) - 20, len(whole))]:
        (tmp_path / name).write_bytes(whole[:length])
        if length < len(whole) - 20:
            with pytest.raises(MediaError, match=f"{name}' (cannot be decoded|is none of)"):
                load(tmp_path, name)
            continue
        try:  # the last bytes of some formats hold no pixel
            assert torch.equal(load(tmp_path, name), pixels)
        except MediaError as error:
            assert name in str(error)


@pytest.mark.parametrize("name", ["a.tiff", "a.ppm", "a.ico"])
def test_other_formats_stay_closed(tmp_path: Path, name: str) -> None:
    saved(tmp_path, noise((32, 32)), name)
    with pytest.raises(MediaError, match="none of JPEG, PNG, WEBP, GIF, BMP"):
        load(tmp_path, name)


def test_the_pixel_limit_is_read_from_the_header(tmp_path: Path) -> None:
    saved(tmp_path, Image.new("L", (100, 100)))
    assert load(tmp_path, "a.png", max_pixels=10_000).shape == (3, 30, 30)
    header_only = (tmp_path / "a.png").read_bytes()[:60]
    (tmp_path / "a.png").write_bytes(header_only)
    with pytest.raises(MediaError, match=r"100 x 100 = 10000 pixels; data.max_pixels allows 9999"):
        load(tmp_path, "a.png", max_pixels=9_999)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_the_limit_is_ours_and_not_the_one_of_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's holds for the whole process, and would make a larger data.max_pixels idle. It alone warns, too."""
    data = encoded(noise((100, 100)), kind)
    usual = loaded(data, CLIP, max_pixels=10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    if kind == "WEBP":
        with pytest.raises(MediaError, match="more pixels than Pillow decodes of its format"):
            loaded(data, CLIP, max_pixels=10_000)
        return
    with warnings.catch_warnings(action="error"):
        assert torch.equal(loaded(data, CLIP, max_pixels=10_000), usual)
    with pytest.raises(MediaError, match=r"data\.max_pixels allows 9999"):
        loaded(data, CLIP, max_pixels=9_999)
    assert Image.MAX_IMAGE_PIXELS == 1_000


@pytest.mark.parametrize("side", [30_000, 2**31 - 1])
def test_a_bomb_is_judged_by_its_header(side: int) -> None:
    header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    idat = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(MediaError, match=f"{side} x {side} = {side * side} pixels; data.max_pixels allows 64000000"):
        loaded(data + idat, CLIP)


def test_a_strip_that_becomes_wide_at_its_old_height_is_refused(tmp_path: Path) -> None:
    """SigLIP's square is small, but Pillow passes through 30 x 200,000 pixels on the way."""
    saved(tmp_path, Image.new("L", (1, 200_000)))
    with pytest.raises(MediaError, match="1 x 200000: so narrow"):
        load(tmp_path, "a.png", SIGLIP, "square")


@pytest.mark.parametrize("fit", ["pad", "square"])
def test_a_strip_does_not_grow_without_limit(tmp_path: Path, fit: str) -> None:
    saved(tmp_path, Image.new("L", (9_000, 1)))
    with pytest.raises(MediaError, match="9000 x 1: so narrow"):
        load(tmp_path, "a.png", fit=fit, max_pixels=10_000)


def test_paths_stay_inside_their_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root2"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    saved(root, noise((30, 30)))
    saved(outside, noise((30, 30), seed=1))
    inner = load(root, "a.png")
    assert torch.equal(load(root, "sub/../a.png"), inner)
    for path, reason in [
        (str(root / "a.png"), "absolute"),
        ("../root2/a.png", "leaves media_root"),
        ("missing.png", "does not exist"),
        ("sub", "not a regular file"),
        ("https://example.org/a.png", "does not exist"),
        ("a\0.png", "no usable path"),
    ]:
        with pytest.raises(MediaError, match=reason):
            load(root, path)


def test_links_leave_the_root_only_when_told(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root2"
    root.mkdir()
    outside.mkdir()
    saved(outside, noise((30, 30)))
    saved(root, noise((30, 30), seed=1))
    os.symlink(outside, root / "out")
    os.symlink(root / "a.png", root / "in.png")
    assert torch.equal(load(root, "in.png"), load(root, "a.png"))
    with pytest.raises(MediaError, match=r"data\.follow_links = true"):
        load(root, "out/a.png")
    assert torch.equal(load(root, "out/a.png", links=True), load(outside, "a.png"))
    with pytest.raises(MediaError, match="leaves media_root"):
        load(root, "out/../../root2/a.png", links=True)


def test_an_empty_root_is_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, noise((30, 30)))
    monkeypatch.chdir(tmp_path)
    expected = decoded(str(tmp_path / "a.png"), CLIP, "pad", 10**6)
    assert torch.equal(decoded(resolve_path("a.png", "", follow_links=False), CLIP, "pad", 10**6), expected)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(MediaError, match="not a regular file"):
        load(tmp_path, "a.png")


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize("fit", ["pad", "square", "tiles"])
def test_a_frame_is_one_view_like_a_picture(fit: str, decode: str) -> None:
    config = DataConfig(image_fit=fit, image_decode=decode, max_tiles=6 if fit == "tiles" else 1)  # type: ignore[arg-type]
    picture = noise((60, 40))
    found = image.frame_rows(Picture.of(picture), CLIP, config)
    assert found.shape == (1, 3, 30, 30)
    if fit == "tiles":  # what a picture of several tiles has last
        blob, ref = Blob("memory", data=encoded(picture, "PNG")), MediaRef("image", "memory")
        rows = image.load(blob, ref, CLIP, config, image.measure(blob, ref, CLIP, config, 1))
        assert len(rows) == 7 and torch.equal(found[0], rows[-1])
    else:
        assert torch.equal(found[0], loaded(encoded(picture, "PNG"), CLIP, image_fit=fit, image_decode=decode))


KINDS = {"JPEG": "RGB", "PNG": "RGB", "WEBP": "RGB", "GIF": "P", "BMP": "RGB"}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_damage_is_a_media_error_or_a_picture_and_nothing_else(data: st.DataObject, kind: str) -> None:
    damaged = bytearray(encoded(noise((40, 25), KINDS[kind]), kind))
    near = st.integers(0, 80) | st.integers(0, len(damaged) - 1)  # headers are where it hurts
    for position, byte in data.draw(st.lists(st.tuples(near, st.integers(0, 255)), min_size=1, max_size=6)):
        damaged[position] = byte
    blob, ref = Blob("damaged", data=bytes(damaged)), MediaRef("image", "damaged")
    for config in (DataConfig(max_pixels=10**5), DataConfig(max_pixels=10**5, image_fit="tiles", max_tiles=4, image_decode="fast")):
        try:
            image.check_file(blob)
            meta = image.measure(blob, ref, CLIP, config, 1)
            assert image.load(blob, ref, CLIP, config, meta).shape == (meta.num_rows, 3, 30, 30)
        except MediaError as error:
            assert "'damaged'" in str(error)
