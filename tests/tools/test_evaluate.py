"""`tools.evaluate` says the same on any ranks, shows what is wrong, and writes what other evaluations read."""

from __future__ import annotations

import argparse
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.records.record import Record, RecordError, parse
from tests.support.pages.browser import CHROMIUM, browser
from tests.support.ranks import run_ranks
from tests.support.runs import save_parts, save_records, tables
from tools import evaluate
from tools.evaluation.answer_formats import FORMATS, format_answers, vqa_answer
from tools.evaluation.wrong_answers_page import is_wrong
from trainer.distributed.world import World
from trainer.main import run
from trainer.runfile.load import parse_config
from trainer.scores import text_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nothing has trained, and records of which two in three expect what it says."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_parts(folder, "qwen2")
    save_records(folder, 9)
    assert run(parse_config(tables(folder, train={"max_steps": 0}), "test")) == 0
    said = folder / "said.jsonl"
    assert evaluate.main([*arguments(folder, "train.json"), "--predictions", str(said)]) == 0
    records = json.loads((folder / "train.json").read_text())
    for i, (record, line) in enumerate(zip(records, map(json.loads, said.read_text().splitlines()), strict=True)):
        assert record["id"] == line["id"]  # in the order of the file, not in that of the batches
        record["conversations"][-1]["value"] = line["generated"] if i % 3 else "<b>something</b> else"
    (folder / "test.json").write_text(json.dumps(records))
    return folder


def arguments(folder: Path, data: str) -> list[str]:
    return [
        *(str(folder / "run/final"), "--data", str(folder / data), "--media-root", str(folder / "images")),
        *("--max-new-tokens", "5", "--batch-size", "2"),
    ]


def on_rank(world: World, options: argparse.Namespace) -> str:
    """What one of several ranks prints."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()):
        evaluate.evaluate(options, world)
    return said.getvalue()


def test_ranks_share_the_records_and_say_what_one_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    asked = [*arguments(folder, "test.json"), "--metrics", "exact_match,contains,choice", "--json"]
    assert evaluate.main([*asked, "--predictions", str(alone)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["samples"] == 9 and found["exact_match"] == 6 / 9 and found["choice"] is None  # no answer is a letter
    options = evaluate.parser().parse_args([*asked, "--predictions", str(together)])
    assert run_ranks(on_rank, 2, options) == [printed, ""]
    assert alone.read_bytes() == together.read_bytes()


class Page(HTMLParser):
    """Elements of a page, and whether each that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_wrong_answers_alone_with_their_pictures(folder: Path, tmp_path: Path) -> None:
    assert evaluate.main([*arguments(folder, "test.json"), "--page", str(tmp_path / "wrong.html")]) == 0
    text = (tmp_path / "wrong.html").read_text()
    page = Page(text)
    assert not page.open and "script" not in page.tags
    records = [record for i, record in enumerate(json.loads((folder / "test.json").read_text())) if i % 3 == 0]
    pictures = sum(len(names) if isinstance(names := r.get("image", []), list) else 1 for r in records)
    assert page.tags.count("article") == len(records) == 3 and page.tags.count("img") == pictures
    assert all(source.startswith("data:image/png;base64,") for source in page.sources) and "default-src 'none'" in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == [record["id"] for record in records]
    assert "&lt;b&gt;something&lt;/b&gt; else" in text and "<b>something" not in text
    assert "exact_match</th><td>0.6667" in text
    if CHROMIUM is None:
        return
    with browser(tmp_path) as seen:
        seen.open((tmp_path / "wrong.html").as_uri())
        assert seen.run("[...document.images].map((image) => image.naturalWidth > 0)") == [True] * pictures
        for width in (360, 1400):
            seen.resize(width, 900)
            assert seen.run("document.documentElement.scrollWidth <= innerWidth"), width


def test_what_is_wrong_depends_on_the_measure() -> None:
    assert not is_wrong("exact_match", "a", " a ") and is_wrong("exact_match", "A", "a") and not is_wrong("contains", "A b", "a")
    assert not is_wrong("choice", "B. two", "B") and is_wrong("choice", "C", "B") and is_wrong("choice", "x", "no letter")
    assert is_wrong("bleu", "a", "b") and not is_wrong("bleu", "a", "a")


def records_of(*ids: str) -> list[Record]:
    return [
        parse(
            {
                "id": id,
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat colour?\nAnswer shortly."},
                    {"from": "gpt", "value": "red"},
                ],
            },
            f"test.json:{i}",
        )
        for i, id in enumerate(ids, 1)
    ]


QUESTION = "What colour?\nAnswer shortly."


def test_answers_are_written_as_benchmarks_read_them() -> None:
    """Fields and types are those that LLaVA's scripts ask for; docs/operations.md names them."""
    two, texts = records_of("7", "12"), ["The Red.", "two dogs"]
    assert json.loads(format_answers("vqav2", two, texts)) == [
        {"question_id": 7, "answer": "red"},
        {"question_id": 12, "answer": "2 dogs"},
    ]
    assert json.loads(format_answers("gqa", two, texts)) == [
        {"questionId": "7", "prediction": "the red"},
        {"questionId": "12", "prediction": "two dogs"},
    ]
    for name in set(FORMATS) - {"vqav2", "gqa"}:
        first = json.loads(format_answers(name, two, texts).splitlines()[0])
        expected: dict[str, Any] = {"question_id": 7 if name in ("pope", "mmbench") else "7", "text": "The Red."}
        expected["prompt"] = f"<image>\n{QUESTION}" if name == "scienceqa" else QUESTION
        assert {key: first[key] for key in expected} == expected, name
    with pytest.raises(RecordError, match=r"test\.json:1 a/b\.png: id: is no whole number"):
        format_answers("pope", records_of("a/b.png"), ["yes"])


def test_answers_of_vqa_are_normalised_as_its_evaluation_does() -> None:
    """Values of LLaVA's EvalAIAnswerProcessor for the same texts."""
    texts = {
        "Two dogs, and a cat.": "2 dogs and cat",
        "x-ray": "x ray",
        "yes / no": "yes no",
        "3.5 inches.": "3.5 inches",
        "dont know": "don't know",
        "It's the dog's": "it 's dog 's",
        "1,000": "1000",
        "": "",
    }
    assert {text: vqa_answer(text) for text in texts} == texts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["--metrics", "exact"], "--metrics: 'exact' is not exact_match | anls"),
        (["--metrics", ","], "--metrics ',' names none"),
        (["--metrics", "anls"], "--metrics: anls needs rapidfuzz: pip install -e '.[metrics]'"),
        (["--format", "gqa"], "--format gqa is of the file that --predictions FILE names"),
    ],
)
def test_wrong_options_are_named(
    folder: Path, changes: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    assert evaluate.main([*arguments(folder, "test.json"), *changes]) == 2
    assert reason in capsys.readouterr().err
