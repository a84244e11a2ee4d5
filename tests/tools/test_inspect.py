"""The inspector shows what the dataset gives, nothing else, and its page runs nothing that came with the data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data.dataset import MultimodalDataset
from model.batch import IGNORE_INDEX
from model.media_spec import ImageSpec
from tests.support.pages.inspect_reader import Page
from tests.support.runs import save_records, tables
from tests.support.tiny_data import sample, talk
from tools import inspect_data
from tools.inspector import choose
from tools.inspector.entry import InspectorEntry, entry_of
from tools.inspector.page_html import SCRIPT, STYLE
from tools.inspector.pictures import pixels
from tools.watcher.run_view import RunView
from tools.watcher.step_page import StepPages
from trainer.main import run
from trainer.records.quarantine import NAME
from trainer.records.sample_log import read_step
from trainer.runfile.load import parse_config
from trainer.runfile.toml_files import to_toml

HOSTILE = "</mark><script>alert(1)</script><img src=x onerror=alert(2)> & \"q\" 'a' \u202egnp.exe \u0007 \u00a0"


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


def seen(folder: Path) -> tuple[MultimodalDataset, dict[int, InspectorEntry]]:
    opened = choose.open_sources(choose.stage_to_inspect(str(folder / "run.toml"), None, []))
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


def test_choices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = seen(folder)
    assert ids_of(page_of(folder, "--source", "<b>other</b>")) == [8]
    assert ids_of(page_of(folder, "--num", "2")) == [0, 4, 8], "spread over each source"
    assert ids_of(page_of(folder, "--modality", "text")) == [0, 3, 6, 8]
    assert ids_of(page_of(folder, "--modality", "image", "--num", "9")) == [1, 2, 4, 5, 7]
    capsys.readouterr()
    assert inspect_data.main(["--cfg", str(folder / "run.toml"), "--modality", "video", "--source", "train"]) == 0
    assert "none fits the choice" in capsys.readouterr().out
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
    kind, text = StepPages().page(RunView(folder / "run"), 2)  # the run page counts what is completed
    assert kind == "text/html" and ids_of(Page(text)) == ids_of(made)
    assert StepPages().page(RunView(folder / "run"), 999) == ("text/plain", "step 999 of run is not on record\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cfg", "a.toml", "--run", "b"], "name a run file with --cfg, or a run's folder with --run"),
        ([], "name a run file with --cfg, or a run's folder with --run"),
        (["--cfg", "run.toml", "--source", "x"], "--source 'x' is none of the run's: train, <b>other</b>"),
        (["--cfg", "run.toml", "--num", "-1"], "--num -1 is not positive"),
        (["--cfg", "run.toml", "--num", "0"], "--num 0 is not positive"),
        (["--cfg", "run.toml", "--step", "0"], "--step shows what one step of a run was trained on: it needs --run"),
        (["--run", "run", "--step", "7"], "step 7 is not on record"),
        (["--cfg", "run.toml", "--quarantined", "output_dir=none"], "--quarantined: 'none' holds no quarantine.jsonl"),
        (["--cfg", "run.toml", "--html", "no/where.html"], "'no/where.html' cannot be written: No such file"),
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
