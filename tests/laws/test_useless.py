"""Runs that could come to nothing: refused before they train, or ended with a code that says so."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.health import start_planted
from tests.support.ranks import run_ranks
from tests.support.runs import merged, start, start_alone
from tests.support.stages import ADAPT, ALIGN, WHOLE

THREE: list[dict[str, Any]] = [ALIGN, ADAPT, WHOLE]


def told(run: Path) -> tuple[int, str]:
    written = json.loads((run / "exit.json").read_text())
    return written["code"], written["reason"]


def with_last_data(parts: Path, tmp_path: Path, records: list[Any], **data: Any) -> dict[str, Any]:
    """Three stages, the last of which reads `records` and has settings of its own."""
    (tmp_path / "last.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = [{"path": str(tmp_path / "last.jsonl"), "media_root": str(parts / "images")}]
    last = merged(WHOLE, {"data": {"sources": sources, **data}, "train": {"max_steps": 2}})
    return {"lora": {"rank": 2}, "stage": [*THREE[:2], last]}


def talk(answer: str = "A cat.", question: str = "<image>What?", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "image": "1_0.png", **more}


@pytest.mark.parametrize(
    ("records", "data", "code", "reason"),
    [
        ([talk(), talk("")] * 20, {}, 65, "stage whole: at least 20 of 40 train records are bad"),
        (
            [talk(question="<image>" + "word " * 300)] * 9,
            {"max_length": 99},
            65,
            "stage whole: train source 'last': 9 of 9 records",
        ),
        ([{**talk(question="What?"), "image": []}] * 9, {}, 2, "stage whole: [model.vision] can never be fed"),
    ],
)
def test_a_fault_of_the_last_stages_data_ends_the_start(
    parts: Path, tmp_path: Path, records: list[Any], data: dict[str, Any], code: int, reason: str
) -> None:
    begun = start_alone(parts, tmp_path / "run", with_last_data(parts, tmp_path, records, **data))
    assert begun.code == code and begun.seen == []
    assert told(tmp_path / "run")[1].startswith(reason)
    assert not list((tmp_path / "run").glob("stages/*/final"))


def test_what_later_stages_hold_is_told_and_what_they_inherit_needs_no_data(parts: Path, tmp_path: Path) -> None:
    """The second stage reads text alone; its tower is frozen and comes along."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"conversations": talk(question="What?")["conversations"]}) + "\n")
    frozen = {"vision": {"tune": "frozen"}, "vision_projector": {"tune": "frozen"}}
    text = {
        "name": "text",
        "model": frozen,
        "data": {"sources": [{"path": str(tmp_path / "text.jsonl")}]},
        "train": {"max_steps": 1},
    }
    begun = start_alone(parts, tmp_path / "run", {"stage": [merged(ALIGN, {"train": {"max_steps": 1}}), text]})
    assert begun.code == 0
    assert "later     text: train text: looked at 1 of 1 records: 0 bad" in begun.said


def test_a_run_all_of_whose_updates_were_skipped_is_no_success_however_often_it_is_started(parts: Path, tmp_path: Path) -> None:
    every = tuple((step, sample) for step in range(2) for sample in range(22))
    run, sections = tmp_path / "run", {"train": {"max_steps": 2}}
    for _ in range(2):
        answers = run_ranks(start_planted, 2, parts, run, sections, math.nan, every)
        assert {answer.code for answer in answers} == {70}
        code, reason = told(run)
        assert code == 70 and reason.startswith("nothing was learned: all 2 updates were skipped, because loss or gradient was not")
        assert "samples " in reason and not (run / "final").exists()


def test_a_run_that_could_use_no_record_is_no_success_however_often_it_is_started(parts: Path, tmp_path: Path) -> None:
    """The only ones its step asks for have pictures that cannot be decoded, which their headers hide."""
    shutil.copytree(parts / "images", tmp_path / "images")
    for path in (tmp_path / "images").glob("1_0.png"):
        path.write_bytes(path.read_bytes().replace(b"IDAT\x78", b"IDAT\x00"))
    records = [talk(id=f"r{i}") for i in range(6)] + [{"conversations": talk(question="What?")["conversations"]}] * 9
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"path": str(tmp_path / "mixed.jsonl"), "media_root": str(tmp_path / "images")}
    sections = {"data": {"sources": [source], "order": "sequential"}, "train": {"max_steps": 1}}
    for _ in range(2):
        assert {answer.code for answer in run_ranks(start, 2, parts, tmp_path / "run", sections)} == {65}
        reason = told(tmp_path / "run")[1]
        assert reason.startswith("nothing was learned: none of the 6 records that 1 steps asked for could be used; one of them: ")
        assert "mixed.jsonl:1 r0: image: " in reason and not (tmp_path / "run" / "final").exists()
    assert start_alone(parts, tmp_path / "run", merged(sections, {"train": {"max_steps": 2}})).code == 0
