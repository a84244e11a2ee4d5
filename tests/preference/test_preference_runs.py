"""Whole runs on preferences: what they log, exact resume, and the file that holds the reference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.collate import collate
from tests.support.config import MINIMAL, problems
from tests.support.loop import lines_of
from tests.support.preference.pairs import save_pairs
from tests.support.ranks import run_ranks
from tests.support.resume import cut, weights
from tests.support.runs import Start, failure_of, merged, save_parts, start, start_alone
from tests.support.tiny_data import dataset, talk
from tests.support.trainable import ALONE
from tools.evaluate import main as evaluate_main
from tools.inspect_data import main as inspect_main
from trainer.distributed.world import World
from trainer.preference import reference
from trainer.preference.collapse import CollapseWatch
from trainer.runfile.load import parse_config
from trainer.step import StepResult

NAMES = ("chosen_log_prob", "rejected_log_prob", "chosen_reward", "rejected_reward", "preference_margin", "preference_accuracy")
ADAPTERS: dict[str, Any] = {
    "model": {"llm": {"tune": "lora"}, "vision": None, "vision_projector": None},
    "lora": {"rank": 2, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    save_pairs(folder)
    texts = [record for record in json.loads((folder / "train.json").read_text()) if "image" not in record]
    (folder / "texts.json").write_text(json.dumps(texts))
    return folder


def sections_of(parts: Path, **changes: Any) -> dict[str, Any]:
    source = {"path": str(parts / "train.json"), "media_root": str(parts / "images")}
    base: dict[str, Any] = {
        "preference": {"kind": "mpo"},
        "data": {"sources": [source], "validation": [source]},
        "validation": {"every": 3},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 5},
        "log": {"every": 2},
    }
    return merged(base, changes)


def reference_of(run: Path, split: str = "train") -> Path:
    return run / "index" / f"reference-{split}.safetensors"


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start_alone(parts, folder, sections_of(parts)).code == 0
    return folder


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(("perf/", "mem/"))}


def test_a_run_logs_what_it_prefers(whole: Path) -> None:
    """At step 1 the model is its reference; at the end it prefers what was chosen, in validation too."""
    first, *_, last = [line for line in lines_of(whole) if "train/loss" in line]
    assert first["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["train/reference_kl"] == pytest.approx(0, abs=1e-6) and first["train/preference_margin"] == pytest.approx(
        0, abs=1e-6
    )
    assert last["train/preference_accuracy"] == 1 and last["train/preference_margin"] > 0.1
    validation = [line for line in lines_of(whole) if "val/loss" in line][-1]
    for name in NAMES:
        assert validation[f"val/{name}"] == pytest.approx(validation[f"val/train/{name}"], abs=1e-5)
    assert validation["val/preference_accuracy"] == 1
    assert validation["val/chosen_reward"] - validation["val/rejected_reward"] == pytest.approx(validation["val/preference_margin"])


@pytest.mark.parametrize(("step", "is_lost"), [(3, True), pytest.param(2, False, marks=pytest.mark.long)])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    parts: Path, whole: Path, tmp_path: Path, step: int, is_lost: bool
) -> None:
    """Weights, logs and the file of the reference; the same where that file was lost."""
    again = cut(whole, tmp_path / "again", step)
    if is_lost:
        reference_of(again).unlink()
    answer = start_alone(parts, again, sections_of(parts))
    assert answer.code == 0
    said = "computed: there was no file of an earlier start" if is_lost else "of an earlier start"
    assert f"reference reference-train.safetensors {said}" in answer.said
    assert weights(again) == weights(whole)
    assert reference_of(again).read_bytes() == reference_of(whole).read_bytes()
    assert [untimed(line) for line in lines_of(again)] == [untimed(line) for line in lines_of(whole)]


def ends_in_the_pass(world: World, parts: Path, output_dir: Path, sections: dict[str, Any]) -> Start:
    """A start that ends when the second micro-batch of the reference is computed."""
    places, calls = reference._places, count()

    def fails(*args: Any) -> Any:
        if next(calls) == 1:
            raise OSError("the disk is gone")
        return places(*args)

    with patch.object(reference, "_places", fails):
        return start(world, parts, output_dir, sections)


@pytest.mark.long
def test_a_run_that_ended_while_its_reference_was_computed_ends_with_the_same_bytes(
    parts: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_ranks(ends_in_the_pass, 1, parts, run, sections_of(parts))[0].code != 0
    assert not reference_of(run).exists()
    assert start_alone(parts, run, sections_of(parts)).code == 0
    assert weights(run) == weights(whole)
    assert reference_of(run).read_bytes() == reference_of(whole).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"data": {"system": "Be brief."}}, "[data] and the template changed since the file was written"),
        ({"model": {"vision": {"layer": -1}}}, "[model] changed since the file was written"),
        ({"seed": 3}, "seed changed since the file was written"),
        ({}, "the file of an earlier start is damaged"),
    ],
)
def test_a_reference_of_other_settings_is_not_used(
    parts: Path, whole: Path, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    run = tmp_path / "run"
    (run / "index").mkdir(parents=True)
    shutil.copy(reference_of(whole), reference_of(run))
    if not changed:
        content = bytearray(reference_of(run).read_bytes())
        content[-3] ^= 1
        reference_of(run).write_bytes(content)
    answer = start_alone(parts, run, sections_of(parts, **changed, train={"max_steps": 1}))
    assert answer.code == 0
    assert f"reference reference-train.safetensors computed: {reason}" in answer.said


@pytest.mark.long
def test_packed_and_sharded_runs_are_the_same_run(parts: Path, whole: Path, tmp_path: Path) -> None:
    packed = {
        "data": {"packing": True, "max_length": 256},
        "batch": {"micro_batch_tokens": 256, "micro_batch_size": None},
        "parallel": {"strategy": "fsdp"},
    }
    assert {answer.code for answer in run_ranks(start, 2, parts, tmp_path / "run", sections_of(parts, **packed))} == {0}
    for line, same in zip(lines_of(tmp_path / "run"), lines_of(whole)):
        for name in (key for key in same if "preference" in key or "log_prob" in key or key == "val/loss"):
            assert line[name] == pytest.approx(same[name], rel=1e-4, abs=1e-5), name
    one, two = (load_file(reference_of(run))["log_probs"] for run in (whole, tmp_path / "run"))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.long
def test_adapters_need_no_file_until_they_have_learned(parts: Path, tmp_path: Path) -> None:
    source = {"path": str(parts / "texts.json")}
    sections = merged(sections_of(parts), {"preference": {"kind": "dpo"}, "data": {"sources": [source], "validation": [source]}})
    sections = merged(sections, ADAPTERS)
    first = start_alone(parts, tmp_path / "first", sections)
    assert first.code == 0 and "reference the model without its adapters" in first.said
    assert not reference_of(tmp_path / "first").exists()
    later = merged(sections, {"model": {"init_from": str(tmp_path / "first" / "final")}})
    second = start_alone(parts, tmp_path / "second", later)
    assert "reference stored: the adapters have learned before" in second.said and second.code == 0
    line = lines_of(tmp_path / "second")[0]
    assert line["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-5) and line["train/preference_margin"] == pytest.approx(
        0, abs=1e-5
    )
    stored = start_alone(parts, tmp_path / "stored", merged(sections, {"preference": {"reference": "stored"}}))
    assert stored.code == 0 and reference_of(tmp_path / "stored").exists()
    for one, other in zip(lines_of(tmp_path / "first"), lines_of(tmp_path / "stored"), strict=True):
        for name in (key for key in one if "preference" in key):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5)


def test_records_without_a_preference_are_bad_ones(parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 9))
    sections = sections_of(parts, data={"sources": [{"path": str(path)}], "validation": []}, validation=None, **ADAPTERS)
    code, reason = failure_of(parts, tmp_path / "run", sections)
    assert code == 65 and "chosen: the record has no chosen and rejected answer" in reason


def test_settings_of_other_kinds_and_wrong_values_are_named() -> None:
    assert "[preference] has no effect with preference.kind = 'none': name a kind" in problems(preference={"beta": 0.2})
    found = problems(preference={"kind": "kto", "beta": 0.0, "label_smoothing": 0.6, "sft_weight": -2.0})
    wrong = ("beta = 0.0 is not", "label_smoothing = 0.6 is not", "sft_weight = -2.0 is", "label_smoothing has no effect with")
    assert all(f"preference.{line}" in found for line in wrong)
    held_out = {"data": {"validation": [{"path": "b.json"}]}, "checkpoint": {"best": "val/preference_accuracy"}}
    parse_config(merged(MINIMAL, {**held_out, "preference": {"kind": "dpo"}}), "run.toml")
    assert "checkpoint.best = 'val/preference_accuracy' is not" in problems(**held_out, preference={"kind": "kto"})


def test_a_final_is_compared_on_held_out_pairs(parts: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the last validation of the run said."""
    options = ["--data", str(parts / "train.json"), "--media-root", str(parts / "images"), "--batch-size", "3", "--json"]
    assert evaluate_main([str(whole / "final"), *options, "--preferences"]) == 0
    found = json.loads(capsys.readouterr().out)
    validation = [line for line in lines_of(whole) if "val/loss" in line][-1]
    assert found["samples"] == 22
    for name in ("preference_accuracy", "chosen_log_prob", "rejected_log_prob"):
        assert found[name] == pytest.approx(validation[f"val/{name}"], rel=1e-5)
    assert evaluate_main([str(whole / "final"), *options, "--preferences", "--page", "x.html"]) == 2


def test_the_inspector_shows_both_answers(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main(["--run", str(whole), "--num", "2"]) == 0
    said = capsys.readouterr().out
    assert "\nchosen: {+1 cats on a mat<|im_end|>+}\nrejected: {~no 1 dogs<|im_end|>~}" in said
    assert "[image 4 tokens: 1_0.png]" in said
    assert inspect_main(["--run", str(whole), "--html", str(tmp_path / "pairs.html")]) == 0
    page = (tmp_path / "pairs.html").read_text()
    assert page.count("<section class='answer'>") == page.count("<section class='answer unwanted'>") == 44


def test_chosen_answers_that_fall_throughout_are_told_with_their_samples(tmp_path: Path) -> None:
    """After five falls in a row below the reference, once; again only after a rise."""
    data = dataset(tmp_path, [talk("a", "b"), talk("c", "d"), talk("e", "f")])
    watch = CollapseWatch(data, ALONE)
    batch = replace(collate([], 0), sample_ids=torch.tensor([2, 0]), lengths=(3, 3))
    zero = torch.zeros(())
    watch.add([batch], StepResult([], zero, zero, [{"chosen_reward": torch.tensor([[-4.0, -1.0], [2.0, 1.0]])}], zero, zero, zero))
    falling = [watch.observe({"train/chosen_reward": value}) for value in (0.4, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2)]
    assert falling[:5] == [""] * 5 and falling[6] == ""
    assert "in each of the last 5 logged lines (reward 0.400 to -0.100)" in falling[5]
    assert falling[5].endswith("lowest in the last step: mix.jsonl:3 (-2.00), mix.jsonl:1 (-1.00)")
    again = [watch.observe({"train/chosen_reward": value}) for value in (-0.1, -0.2, -0.3, -0.4, -0.5, -0.6)]
    assert [bool(text) for text in again] == [False] * 5 + [True]
    assert not any(watch.observe({"train/loss": -value}) for value in range(9))


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"quantize": {"bits": 4}}, {"model": {"dtype": "bfloat16"}}, {"lora": {"dropout": 0.3}}])
def test_adapters_are_switched_off_over_any_base(parts: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Few bits, or a narrower type: as new adapters have no effect, dropped out or not, the first loss is log 2."""
    source = {"path": str(parts / "texts.json")}
    data = {"packing": True, "max_length": 256, "sources": [source], "validation": []}
    batch = {"micro_batch_tokens": 256, "micro_batch_size": None}
    base = sections_of(parts, preference={"kind": "dpo"}, data=data, batch=batch, validation=None)
    answer = start_alone(parts, tmp_path / "run", merged(merged(base, ADAPTERS), changes))
    assert answer.code == 0 and "reference the model without its adapters" in answer.said
    first, *_, last = lines_of(tmp_path / "run")
    assert first["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert last["train/preference_loss"] < first["train/preference_loss"] and last["train/preference_accuracy"] == 1
