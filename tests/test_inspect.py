"""The inspector shows what the dataset gives, nothing else, and its page runs nothing that came with the data."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import wave
from dataclasses import dataclass, field
from html.parser import HTMLParser
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
from data.template import Template, load_template
from model.batch import IGNORE_INDEX, AudioSpec, ImageSpec, MediaSpec
from tests.runs import save_records, tables
from tests.tiny_data import SPEC, dataset, grey, sample, source, talk
from tests.tiny_tokenizers import NAMES, tiny_tokenizer
from tools import inspect_data
from tools.inspect_entry import RAW_LIMIT, Box, Entry, entry_of, token_pieces
from tools.inspect_html import Shown, page
from tools.inspect_page import SCRIPT, STYLE
from tools.inspect_pictures import EXACT_SIDE, Album, picture, pixels, sound
from trainer.main import run
from trainer.quarantine import NAME
from trainer.runfile import parse_config
from trainer.schema import to_toml
from trainer.step_log import read_step

HOSTILE = "</mark><script>alert(1)</script><img src=x onerror=alert(2)> & \"q\" 'a' \u202egnp.exe \u0007 \u00a0"
VOID = {"meta", "img", "input", "br", "rect", "path"}


@dataclass
class Card:
    data: dict[str, str]
    headline: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)  # of tokens outside of boxes
    learned: list[int] = field(default_factory=list)
    boxes: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


class Page(HTMLParser):
    """What a browser would make of the page: its cards, scripts and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[Card] = []
        self.open: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.policy = ""
        self.options: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.attributes |= set(given)
        self.addresses += [given[name] for name in ("src", "href", "action", "data", "srcset", "poster") if name in given]
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "article":
            self.cards.append(Card({key[5:]: value for key, value in given.items() if key.startswith("data-")}))
        if tag == "option":
            self.options.append(given["value"])
        if "text" in self.classes and tag in ("span", "mark") and given.get("class") != "box":
            self.take([int(number) for number in re.findall(r"(\d+) \S+", given["title"])], tag == "mark")
        if tag == "img":
            data = base64.b64decode(given["src"].partition("base64,")[2])
            self.cards[-1].images.append(Image.open(io.BytesIO(data)))
            assert self.cards[-1].images[-1].size[0] * int(given["height"]) == self.cards[-1].images[-1].size[1] * int(
                given["width"]
            )
        if tag not in VOID:
            self.open.append((tag, given.get("class", "")))

    def take(self, ids: list[int], learned: bool) -> None:
        self.cards[-1].ids += ids
        self.cards[-1].learned += ids if learned else []

    @property
    def classes(self) -> list[str]:
        return [name for _, name in self.open]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag = self.open[-1][0] if self.open else ""
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append(data)
        elif "box" in self.classes and "text" in self.classes:
            self.cards[-1].boxes.append(data)
        elif "text" in self.classes or "raw" in self.classes:
            self.cards[-1].text += data
        elif any(tag == "article" for tag, _ in self.open):
            self.cards[-1].headline += data + " "


def page_of(folder: Path, *options: str) -> Page:
    return Page(written(folder, *options))


def written(folder: Path, *options: str, code: int = 0) -> str:
    file = folder / "page.html"
    assert inspect_data.main(["--cfg", str(folder / "run.toml"), "--html", str(file), *options]) == code
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file over hostile and harmless records, and the parts it needs."""
    folder = tmp_path_factory.mktemp("inspect")
    save_records(folder, 8)
    records = json.loads((folder / "train.json").read_text())
    records[1]["id"] = records[1]["conversations"][0]["value"] = HOSTILE
    records[2]["conversations"] += [{"from": "human", "value": "more " * 60}, {"from": "gpt", "value": "no"}]
    records[4]["image"] = f"{HOSTILE}.png"
    records[5]["conversations"][1]["value"] = "long " * 300
    (folder / "train.json").write_text(json.dumps(records, indent=1))
    (folder / "other.jsonl").write_text(json.dumps(talk("Say \U0001f408 na\u00efve\n\n", "\U0001f408 \u2603!", id="o")) + "\n")
    described = tables(folder, data={"max_length": 140}, train={"max_steps": 2}, model={"llm": {"path": str(parts / "llm")}})
    described["model"]["vision"]["path"] = str(parts / "vision")
    described["data"]["sources"].append({"path": str(folder / "other.jsonl"), "name": "<b>other</b>"})
    (folder / "run.toml").write_text(to_toml(described))
    assert run(parse_config(described, "test")) == 0
    return folder


def seen(folder: Path) -> tuple[MultimodalDataset, dict[int, Entry]]:
    opened = inspect_data.open_sources(inspect_data.config_of(str(folder / "run.toml"), None, []))
    data = opened.datasets["sources"]
    return data, {i: entry_of(data, i, {}) for i in range(len(data))}


def test_the_page_holds_what_the_dataset_gives(folder: Path) -> None:
    (folder / "run" / NAME).rename(folder / "aside")
    data, entries = seen(folder)
    shown = page_of(folder).cards
    (folder / "aside").rename(folder / "run" / NAME)
    assert [int(card.data["place"]) for card in shown] == list(range(len(data))) == list(range(9))
    status = {i: card.data["status"] for i, card in enumerate(shown)}
    assert {i: s for i, s in status.items() if s != "trained"} == {2: "shortened", 4: "bad", 5: "too long"}
    assert [card.data["kinds"] for card in shown] == ["text", "image", "image", "text", "image", "image", "text", "image", "text"]
    for i in (0, 1, 2, 3, 6, 7, 8):
        made, card = sample(data, i), shown[i]
        media = made.media.get("image", [])
        inside = {t for medium in media for t in range(medium.start, medium.start + medium.length)}
        outside = [id for t, id in enumerate(made.input_ids.tolist()) if t not in inside]
        assert card.ids == outside and card.learned == [id for id in made.labels.tolist() if id != IGNORE_INDEX]
        assert card.boxes == [f"image {k}: {box.path} · 4 tokens".replace(*_shown) for k, box in enumerate(entries[i].boxes, 1)]
        assert int(card.data["tokens"]) == len(made.input_ids)
        assert f" {len(made.input_ids)}  tokens,  {len(card.learned)}  learned" in f" {card.headline}"
        assert f"planned {data.lengths[i]}" in card.headline
        for image, medium in zip(card.images, media, strict=True):
            assert image.format == "PNG"
            assert np.array_equal(np.asarray(image), pixels(medium.values, spec_of(data))[0])
    assert "1 of 2 rounds dropped" in shown[2].headline and "more" not in shown[2].text
    assert "Not trained on: bad." in shown[4].headline and "does not exist" in shown[4].headline
    assert "the first round takes" in shown[5].headline and "long long" in shown[5].text and not shown[5].ids
    assert shown[8].data["source"] == "<b>other</b>" and "train.json:2" in shown[0].headline


_shown = ("\u202e", "\\u202e")


def spec_of(data: MultimodalDataset) -> ImageSpec:
    spec = data.media(0, data.record(0)).specs["image"]
    assert isinstance(spec, ImageSpec)
    return spec


def test_texts_of_records_stay_texts(folder: Path) -> None:
    text = written(folder)
    made = Page(text)
    assert made.scripts == [SCRIPT] and made.styles == [STYLE]
    assert not {name for name in made.attributes if name.startswith("on")} and "<b>other" not in text
    assert not {"\u202e", "\u0007", "\u00a0"} & set(text), "they would be invisible, or turn what stands after them"
    hostile = made.cards[1]
    assert HOSTILE.split("\u202e")[0] in hostile.text and "\\u202egnp.exe \\x07 \\xa0" in hostile.text
    assert HOSTILE.split("\u202e")[0] in hostile.headline
    assert "\U0001f408 naïve" in made.cards[8].text and "\U0001f408 ☃!" in made.cards[8].text


def test_the_page_asks_nothing_of_a_network_and_runs_only_its_own_script(folder: Path) -> None:
    text = written(folder)
    made = Page(text)
    assert made.addresses and all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", a) for a in made.addresses)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|[=\"'( ]//", text)
    digest = {
        name: base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for name, t in (("script", SCRIPT), ("style", STYLE))
    }
    rules = dict(rule.split(" ", 1) for rule in made.policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert all(rules[f"{name}-src"] == f"'sha256-{value}'" for name, value in digest.items())
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_the_same_data_give_the_same_bytes(folder: Path) -> None:
    assert written(folder) == written(folder)


def test_filters_offer_what_there_is(folder: Path) -> None:
    made = page_of(folder)
    assert set(made.options) >= {"train", "<b>other</b>", "image", "text", "trained", "longest", "shortest"}
    assert not {"audio", "video"} & set(made.options)
    assert {card.data["source"] for card in made.cards} <= set(made.options)
    assert {card.data["status"] for card in made.cards} <= set(made.options)


def ids_of(made: Page) -> list[int]:
    return [int(re.search(r"sample (\d+)", card.headline)[1]) for card in made.cards]  # type: ignore[index]


def test_choices(folder: Path) -> None:
    data, _ = seen(folder)
    assert ids_of(page_of(folder, "--source", "<b>other</b>")) == [8]
    assert ids_of(page_of(folder, "--num", "2")) == [0, 4, 8], "spread over each source"
    assert ids_of(page_of(folder, "--modality", "text")) == [0, 3, 6, 8]
    assert ids_of(page_of(folder, "--modality", "image", "--num", "9")) == [1, 2, 4, 5, 7]
    longest = ids_of(page_of(folder, "--longest", "--num", "3", "--source", "train"))
    assert longest == sorted(range(8), key=lambda i: (-data.lengths[i], i))[:3]
    assert ids_of(page_of(folder, "data.sources.0.take='first:3'")) == [0, 1, 2, 8], "what the run leaves out is not shown"


def test_what_a_run_quarantined_is_shown_with_its_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["sample_id"]: row for row in map(json.loads, (folder / "run" / NAME).read_text().splitlines())}
    assert set(rows) == {4, 5}
    made = page_of(folder, "--quarantined")
    assert ids_of(made) == [4, 5] and {card.data["status"] for card in made.cards} == {"quarantined"}
    for card, (_, row) in zip(made.cards, sorted(rows.items())):
        assert f"at step {row['step']}: " in card.headline and row["reason"].partition(HOSTILE[:5])[0] in card.headline
    capsys.readouterr()
    assert inspect_data.main(["--run", str(folder / "run"), "--quarantined"]) == 0
    assert "train.json:" in (out := capsys.readouterr().out) and "r5: quarantined, not trained on: at step " in out


def test_the_samples_of_a_step_are_those_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (folder / "run").rename(moved)
    try:
        assert inspect_data.main(["--run", str(moved), "--step", "1", "--html", str(tmp_path / "page.html")]) == 0
    finally:
        moved.rename(folder / "run")
    made = Page((tmp_path / "page.html").read_text())
    wanted = read_step(folder / "run", 1).tolist()
    assert sorted(ids_of(made)) == sorted(wanted) and 0 < len(wanted) < 9
    assert [i for i in ids_of(made) if i < 8] == [i for i in wanted if i < 8], "in the order of the step"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cfg", "a.toml", "--run", "b"], "name a run file with --cfg, or a run's folder with --run"),
        ([], "name a run file with --cfg, or a run's folder with --run"),
        (["--cfg", "run.toml", "--source", "x"], "--source 'x' is none of the run's: train, <b>other</b>"),
        (["--cfg", "run.toml", "--num", "-1"], "--num -1 is negative"),
        (["--cfg", "run.toml", "--step", "0"], "--step shows what one step of a run was trained on: it needs --run"),
        (["--run", "run", "--step", "7"], "step 7 is not on record"),
        (["--cfg", "run.toml", "--quarantined", "output_dir=none"], "--quarantined: 'none' holds no quarantine.jsonl"),
        (["--cfg", "run.toml", "--html", "no/where.html"], "no/where.html cannot be written: No such file"),
    ],
)
def test_what_cannot_be_shown_is_named(
    folder: Path, options: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert inspect_data.main(options) == 2
    assert reason in capsys.readouterr().err


def test_a_source_that_would_be_refused_is_shown_as_such(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text(json.dumps([{"id": "<x>", "conversations": []}]))
    text = written(folder, f"data.sources.0.path={tmp_path / 'none.json'}", f"output_dir={tmp_path / 'run'}", code=65)
    assert "The run would refuse this source: " in text and "none of 1 rows can be encoded" in text
    assert Page(text).cards[0].data["status"] == "bad"


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
    return load_template("auto", tokenizer, placeholders="as_written", media_wrap=())


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
    text = inspect_data.printed(entry, colour=False)
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
    assert np.array_equal(np.asarray(read(picture(small))), small)
    large = read(picture(smooth))
    assert large.format == "JPEG" and large.size == (300, 300)
    assert np.abs(np.asarray(large).astype(int) - smooth).mean() < 2


def test_low_pitches_are_drawn_at_the_bottom() -> None:
    row = torch.zeros(4, 6)
    row[0] = 1.0
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(sound(row, 6).partition("base64,")[2]))))
    assert drawn[3].tolist() == [127] * 6 and not drawn[:3].any()


def test_a_full_album_takes_no_part_of_a_medium() -> None:
    album = Album(10)
    assert album.add(lambda: ["1234", "5678"]) == ["1234", "5678"]
    assert album.add(lambda: ["9", "a", "b"]) == [] and album.add(lambda: ["c"]) == [], "and nothing after it"
    assert album.num_left_out == 2 and album.used == 8


def test_pictures_that_have_no_room_are_named(monkeypatch: pytest.MonkeyPatch, media: MultimodalDataset) -> None:
    monkeypatch.setattr("tools.inspect_html.MAX_PICTURE_BYTES", 100)
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
