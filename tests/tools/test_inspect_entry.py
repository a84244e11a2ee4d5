"""What the inspector shows of one record: every token once, every medium in its place, every row an encoder gets."""

from __future__ import annotations

import base64
import io
import json
import re
import tomllib
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken

from data.config import DataConfig
from data.dataset import MultimodalDataset, open_dataset
from data.records.record import parse
from data.text.template import Template, load_template
from model.media_spec import AudioSpec, ImageSpec, MediaSpec
from tests.support.pages.inspect_reader import Page
from tests.support.tiny_data import SPEC, dataset, grey, sample, source, talk
from tests.support.tiny_tokenizers import NAMES, tiny_tokenizer
from tools import inspect_data
from tools.inspector.entry import RAW_LIMIT, Box, entry_of, token_pieces
from tools.inspector.page_html import Shown, page
from tools.inspector.pictures import EXACT_SIDE, Album, picture_address, pixels, sound_address
from trainer.runfile.load import parse_config
from trainer.runfile.toml_files import to_toml


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(text=st.text(st.sampled_from("ab The\n\t .!1é中\U0001f408\u202e"), max_size=24), cuts=st.lists(st.booleans(), min_size=200))
def test_pieces_are_all_ids_and_all_text(name: str, text: str, cuts: list[bool]) -> None:
    tokenizer = tiny_tokenizer(name)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = list(token_pieces(tokenizer, ids, cuts[: len(ids)]))
    assert [id for piece in pieces for id in piece.ids] == ids
    assert [piece.learned for piece in pieces for _ in piece.ids] == cuts[: len(ids)]
    assert [token for piece in pieces for token in piece.tokens] == tokenizer.convert_ids_to_tokens(ids)
    whole = list(token_pieces(tokenizer, ids, [False] * len(ids)))
    assert "".join(p.text for p in whole) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_control_tokens_are_told_from_text() -> None:
    tokenizer = tiny_tokenizer("qwen")
    ids = tokenizer("<|im_start|>user", add_special_tokens=False)["input_ids"]
    first, *rest = token_pieces(tokenizer, list(ids), [False] * len(ids))
    assert first.special and first.text == "<|im_start|>" and not any(piece.special for piece in rest)


AUDIO = AudioSpec(num_mels=8, window_frames=50, full_window=True, strides=(2, 2))


def media_template() -> Template:
    tokenizer = NAMES["qwen"]()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<image>", "<audio>")], special_tokens=True)
    return load_template("auto", tokenizer)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDataset:
    """A tiled picture, frames of a video and a clip of 0.8 s in a window of half a second."""
    folder = tmp_path_factory.mktemp("media")
    wide = np.arange(16 * 48 * 3, dtype=np.uint32).reshape(16, 48, 3) * 37 % 256
    Image.fromarray(wide.astype(np.uint8)).save(folder / "wide.png")
    (folder / "frames").mkdir()
    for level in (10, 20, 30):
        grey(folder / "frames", level)
    with wave.open(str(folder / "a.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((8000 * np.sin(np.arange(12_800) / 9)).astype("<i2").tobytes())
    record = talk("<audio>\n<video> and <image>?", "Yes.", images="wide.png") | {"video": "frames", "audio": "a.wav"}
    config = DataConfig(image_fit="tiles", max_tiles=4, min_frames=2, max_frames=3)
    specs: dict[str, MediaSpec] = {"image": SPEC, "audio": AUDIO}
    return open_dataset((source(folder, [record]),), config, media_template(), specs, folder / "index")


def test_tiles_frames_and_clips_are_boxes_with_their_extent(media: MultimodalDataset) -> None:
    entry = entry_of(media, 0, {})
    assert entry.kinds == ("audio", "video", "image") and [box.medium.kind for box in entry.boxes] == list(entry.kinds)
    facts = [box.facts for box in entry.boxes]
    assert facts == ["21 tokens, 0.80 s", "12 tokens, 3 frames", "16 tokens, 3 x 1 tiles + thumbnail"]
    assert sum(1 if not isinstance(p, Box) else 0 for p in entry.pieces) > 5
    text = inspect_data.entry_text(entry, colour=False)
    assert "[audio 21 tokens, 0.80 s: a.wav]" in text and "[video 12 tokens, 3 frames: frames]" in text
    assert "21 of audio, 16 of image, 12 of video" in text


def shown_page(data: MultimodalDataset) -> Page:
    about = Shown("sources", "mix", "mix.jsonl", 1, "", {}, data.lengths, "exact", "ok", False, 1)
    return Page(page("run.toml", "all", 2048, [(about, [entry_of(data, 0, {})])]))


def test_the_page_draws_every_row_that_an_encoder_gets(media: MultimodalDataset) -> None:
    card = shown_page(media).cards[0]
    found = sample(media, 0).media
    drawn = [np.asarray(image.convert("RGB")) for image in card.images]
    assert [image.mode for image in card.images] == ["P", "P", *["RGB"] * 7]
    views = np.concatenate([pixels(medium.values, SPEC) for medium in found["image"]])
    assert np.array_equal(np.stack(drawn[2:]), views)
    assert [int(view.max()) for view in views[:3]] == [10, 20, 30], "the video's frames, without their normalisation"
    wide = np.asarray(Image.open(Path(str(media.sources[0].media_root)) / "wide.png"))
    assert np.array_equal(np.concatenate(views[3:6], axis=1), wide), "tiles cut from a picture of their size are its pixels"
    assert drawn[0].shape == drawn[1].shape == (8, 50, 3)
    is_grey = [(row == row[..., :1]).all(-1) for row in drawn[:2]]
    assert not is_grey[0].all(0).any() and is_grey[1].all(0).tolist() == [False] * 30 + [True] * 20, "padding is grey"


def test_bytes_are_shown_as_they_are_and_floats_without_their_normalisation() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    spec = ImageSpec(16, 8, 0, "patch", "exact", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    mean, std = (torch.tensor(value)[:, None, None] for value in (spec.mean, spec.std))
    normalised = (levels.float() * spec.rescale - mean) / std
    for values in (levels, normalised):
        assert np.array_equal(pixels(values, spec)[0, ..., 1].ravel(), np.arange(256))


def test_small_pictures_are_exact_and_large_ones_close() -> None:
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((300, 300), Image.Resampling.BICUBIC)
    )

    def read(address: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2])))

    small = smooth[:EXACT_SIDE, :EXACT_SIDE]
    assert np.array_equal(np.asarray(read(picture_address(small))), small)
    large = read(picture_address(smooth))
    assert large.format == "JPEG" and large.size == (300, 300)
    assert np.abs(np.asarray(large).astype(int) - smooth).mean() < 2


def test_low_pitches_are_drawn_at_the_bottom() -> None:
    row = torch.zeros(4, 6)
    row[0] = 1.0
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(sound_address(row, 6).partition("base64,")[2]))))
    assert drawn[3].tolist() == [127] * 6 and not drawn[:3].any()


def test_a_full_album_takes_no_part_of_a_medium() -> None:
    album = Album(10)
    assert album.add(lambda: ["1234", "5678"]) == ["1234", "5678"]
    assert album.add(lambda: ["9", "a", "b"]) == [] and album.add(lambda: ["c"]) == [], "and nothing after it"
    assert album.num_left_out == 2 and album.used == 8


def test_pictures_that_have_no_room_are_named(monkeypatch: pytest.MonkeyPatch, media: MultimodalDataset) -> None:
    monkeypatch.setattr("tools.inspector.page_html.MAX_PICTURE_BYTES", 100)
    card = shown_page(media).cards[0]
    assert not card.images and card.headline.count("left out: the pictures of this source fill") == 3


def test_a_rejected_record_is_shown_as_it_stands(tmp_path: Path) -> None:
    data = dataset(tmp_path, [talk("x " * RAW_LIMIT, "", id="long"), "{broken", talk("Hi", "Ho", images="none.png", id="lost")])
    long, broken, lost = (entry_of(data, i, {}) for i in range(3))
    assert long.status == "bad" and "is an empty answer" in long.reason and long.raw.endswith("characters more")
    assert broken.raw.startswith("cannot be decoded") and broken.reason.startswith("json: ") and broken.where == "mix.jsonl:2"
    assert json.loads(lost.raw)["image"] == "none.png" and lost.kinds == ("image",) and not lost.pieces
    row: dict[str, Any] = {"step": 3, "reason": "image: was cut", "id": "lost"}
    assert entry_of(data, 2, {2: row}).reason == "at step 3: image: was cut"


def test_records_and_sources_of_the_docs_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parents[2] / "docs" / "data.md"
    blocks = re.findall(r"```(json|toml)\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = (text for kind, text in blocks if kind == "json")
    records = [parse(json.loads(line), f"data.md:{i}") for i, line in enumerate(lines.splitlines())]
    assert [tuple(ref.kind for ref in record.media) for record in records] == [
        *[("image",), ("image", "image"), ("image",)],
        *[("video",), ("audio",), (), (), ()],
    ]
    assert [record.num_unlearned for record in records] == [0] * 6 + [1, 0] and len(records[-1].tools) == 1
    run = {"output_dir": "run", "model": {"llm": {"path": "llm"}}}
    tables = [tomllib.loads(text) for kind, text in blocks if kind == "toml"]
    catalog = next(one for one in tables if "data" not in one)
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "catalog.toml").write_text(to_toml(catalog))
    monkeypatch.chdir(tmp_path)
    mixed, *others = (one for one in tables if "data" in one)
    config = parse_config({**run, **mixed}, "data.md")
    assert [source.key for source in config.data.sources] == ["llava_v1_5_mix665k", "speech"]
    for other in others:  # they show other settings of the same data
        parse_config({**run, **other, "data": {"sources": mixed["data"]["sources"], **other["data"]}}, "data.md")
