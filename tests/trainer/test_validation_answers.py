"""Validation with answers says what one record at a time says, on any ranks, and changes nothing of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import load_processor
from model import load_model
from model.errors import ConfigError
from tests.support.loop import lines_of
from tests.support.ranks import run_ranks
from tests.support.resume import cut
from tests.support.runs import config_of, merged, save_parts, save_records, start, start_alone
from trainer import validate
from trainer.machine.json_lines import read_lines
from trainer.scores import text_metrics
from trainer.scores.best import BestValue
from trainer.scores.text_metrics import choice_of, score_texts

OWN = ["exact_match", "choice", "contains"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head that is not tied: a tied one would only repeat itself."""
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder, "qwen2")
    save_records(folder, 9)
    return folder


def held_out(parts: Path) -> dict[str, Any]:
    return {"validation": [{"path": str(parts / "train.json"), "media_root": str(parts / "images"), "name": "held"}]}


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows, problems = read_lines(run / "generations.jsonl", {"step": int})
    assert not problems
    return rows


def test_answers_are_those_of_the_model_alone_on_any_ranks(parts: Path, tmp_path: Path) -> None:
    """Seven records for three ranks in batches of two: under FSDP2 some ranks have nothing to answer and take part."""
    sections: dict[str, Any] = {
        "data": held_out(parts),
        "validation": {"every": 2, "max_samples": 7, "metrics": OWN, "max_new_tokens": 5},
        "train": {"max_steps": 2},
        "optim": {"lr": 1e-5},
    }
    found = {}
    for size, strategy in ((1, "ddp"), (2, "ddp"), (3, "fsdp")):
        run = tmp_path / f"{strategy}{size}"
        assert {s.code for s in run_ranks(start, size, parts, run, {**sections, "parallel": {"strategy": strategy}})} == {0}
        line = [line for line in lines_of(run) if "val/loss" in line][-1]
        found[size] = ({key: value for key, value in line.items() if key.startswith("val/") and "loss" not in key}, rows_of(run))
    assert found[1] == found[2] == found[3]
    values, rows = found[1]
    assert values.keys() == {"val/answers", *(f"{p}/{n}" for p in ("val", "val/held") for n in ("exact_match", "contains"))}
    assert values["val/answers"] == len(rows) == 7 and len({row["sample"] for row in rows}) == 7
    net, processor = load_model(tmp_path / "ddp1" / "final"), load_processor(tmp_path / "ddp1" / "final")
    records = json.loads((parts / "train.json").read_text())
    for row in rows:
        record = records[row["sample"]]
        prompt = processor([record], media_root=str(parts / "images"))
        assert row["id"] == record["id"] and row["expected"] == record["conversations"][1]["value"] and row["step"] == 2
        assert row["prompt"] and record["conversations"][0]["value"].endswith(row["prompt"][-10:])
        assert row["answer"] == processor.answers(net.generate(prompt, max_new_tokens=5))[0][1]
    assert len({row["answer"] for row in rows}) > 1  # otherwise the comparison would show little


def test_answers_change_no_bit_of_training_and_go_on_after_a_resume(parts: Path, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"data": held_out(parts), "train": {"max_steps": 4}, "validation": {"every": 1, "max_samples": 3}}
    asking = {**plain, "validation": {**plain["validation"], "metrics": OWN, "max_new_tokens": 3}}
    assert start_alone(parts, tmp_path / "plain", plain).code == start_alone(parts, tmp_path / "asking", asking).code == 0
    again = cut(tmp_path / "asking", tmp_path / "again", 2)
    assert start_alone(parts, again, asking).code == 0
    proofs = [json.loads((run / "final" / "proof.json").read_text()) for run in (tmp_path / "plain", tmp_path / "asking", again)]
    assert proofs[0] == proofs[1] == proofs[2]
    assert rows_of(again) == rows_of(tmp_path / "asking")
    assert [row["step"] for row in rows_of(again)] == sorted([1, 2, 3, 4] * 3)


VALUES = {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.9, 5: 0.1, 6: 0.3}


def start_with_values(world: Any, parts: Path, run: Path, sections: dict[str, Any], values: dict[int, float]) -> Any:
    """A run whose validations have the given values of contains, by step; nothing is answered."""
    validate.answer_records = lambda prepared, tracker=None: []
    steps = iter(())
    original = validate.validate

    def counted(prepared: Any, quarantine: Any, step: int, tracker: Any = None) -> dict[str, float]:
        nonlocal steps
        steps = iter([step])
        return original(prepared, quarantine, step, tracker)

    validate.validate = counted
    validate.score_rows = lambda *_: {"val/contains": values[next(steps)]}
    return start(world, parts, run, sections)


@pytest.mark.parametrize("size", [1, 2])
def test_the_best_checkpoint_stays_and_becomes_best(parts: Path, tmp_path: Path, size: int) -> None:
    """Step 2 is best, and step 4 ties: best/ holds the weights that the checkpoint of step 2 had, whatever came after it."""
    sections: dict[str, Any] = {
        "data": held_out(parts),
        "train": {"max_steps": 6},
        "validation": {"every": 1, "max_samples": 2, "metrics": ["contains"]},
        "checkpoint": {"every": 99, "keep": 1, "best": "val/contains"},
        "parallel": {"strategy": "fsdp"},
    }
    run = tmp_path / "run"
    answers = run_ranks(start_with_values, size, parts, run, sections, VALUES)
    assert {a.code for a in answers} == {0}
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    best, final = (json.loads((run / name / "provenance.json").read_text())["step"] for name in ("best", "final"))
    assert (best, final) == (2, 6)
    short = {**sections, "train": {"max_steps": 2}, "optim": {"schedule": "constant"}}
    whole = {**sections, "optim": {"schedule": "constant"}}
    assert {a.code for a in run_ranks(start_with_values, size, parts, tmp_path / "short", short, VALUES)} == {0}
    assert {a.code for a in run_ranks(start_with_values, size, parts, tmp_path / "whole", whole, VALUES)} == {0}
    assert (tmp_path / "whole/best/proof.json").read_bytes() == (tmp_path / "short/final/proof.json").read_bytes()
    assert (tmp_path / "short/best/proof.json").read_bytes() == (tmp_path / "short/final/proof.json").read_bytes()
    if size == 1:
        cut_run = cut(run, tmp_path / "cut", 2)
        again = run_ranks(start_with_values, 1, parts, cut_run, sections, {**VALUES, 5: 0.95})
        assert again[0].code == 0 and json.loads((cut_run / "best" / "provenance.json").read_text())["step"] == 5
        assert "nothing left to do" in run_ranks(start_with_values, 1, parts, cut_run, sections, VALUES)[0].said
        assert load_model(run / "best") is not None


def test_ties_keep_the_earlier_and_less_is_better_for_errors() -> None:
    best = BestValue("val/wer")
    assert [best.observe({"val/wer": value}, step) for step, value in enumerate([0.5, 0.7, 0.5, float("nan"), 0.2])] == [
        *(True, False, False, False, True)
    ]
    assert best.state == {"key": "val/wer", "value": 0.2, "step": 4}
    assert not BestValue("val/wer", best.state).observe({"val/wer": 0.2}, 9)
    assert BestValue("val/loss", best.state).observe({"val/loss": 3.0}, 9)
    assert not BestValue("").observe({"val/loss": 3.0}, 9)


def test_measures_have_the_values_of_their_definitions() -> None:
    said, expected = ["B. a dog", "Two  cats", "hello wrld"], ["B", "two cats", "hello world"]
    assert score_texts(OWN, said, expected) == {"exact_match": 0.0, "choice": 1.0, "contains": pytest.approx(1 / 3 + 1 / 3)}
    assert score_texts(OWN, [], []) == {} and "choice" not in score_texts(OWN, ["x"], ["no letter"])
    texts = {"B": "B", "(C)": "C", "D.": "D", "The answer is A.": "A", "A. one\ntwo": "A", "A dog": "", "": "", "Both": ""}
    assert {text: choice_of(text) for text in texts} == texts


def test_measures_of_libraries() -> None:
    pytest.importorskip("jiwer"), pytest.importorskip("rapidfuzz"), pytest.importorskip("sacrebleu")
    said, expected = ["Hello wrld", "the cat sat on", "no"], ["hello world", "the cat sat", "yes"]
    found = score_texts(["anls", "wer", "bleu"], said, expected)
    # 1 of 11 characters differs; 3 of 14 are too many; "no" and "yes" have nothing in common, which counts 0.
    assert found["anls"] == pytest.approx((1 - 1 / 11 + 1 - 3 / 14 + 0) / 3)
    assert found["wer"] == pytest.approx((2 + 1 + 1) / 6)
    long = ["the cat sat on the mat", "a dog ran in the park"]
    assert score_texts(["anls", "wer", "bleu"], long, long) == {"anls": 1.0, "wer": 0.0, "bleu": pytest.approx(100)}
    # Precisions of 1 to 4 words are 5/6, 4/5, 3/4 and 2/3; both texts are as long.
    said = ["the cat sat on the rug"]
    assert score_texts(["bleu"], said, long[:1])["bleu"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"validation": {"metrics": ["exact"]}}, "validation.metrics.0 = 'exact' is not"),
        ({"validation": {"metrics": ["choice", "choice"]}}, "names one twice"),
        ({"validation": {"max_new_tokens": 0, "metrics": ["choice"]}}, "validation.max_new_tokens = 0 is not positive"),
        ({"checkpoint": {"best": "val/anls"}}, "checkpoint.best = 'val/anls' is not 'val/held/loss' | 'val/loss'"),
        ({"checkpoint": {"best": "val/loss"}, "data": {"validation": None}}, "needs \\[\\[data.validation\\]\\]"),
    ],
)
def test_wrong_settings_are_named(parts: Path, tmp_path: Path, sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason.replace("|", "\\|")):
        config_of(parts, **merged({"data": held_out(parts)}, sections))


def test_a_missing_library_is_named_before_training(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"validation.metrics: anls, wer needs jiwer, rapidfuzz: pip install -e '.\[metrics\]'"):
        text_metrics.check_metrics(["choice", "anls", "wer"], "validation.metrics")
