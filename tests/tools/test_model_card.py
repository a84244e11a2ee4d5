"""The card of an export: what a hub's page shows of a real run, with no path of this machine in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.finals import config_of, save_final, save_parts, trained
from tests.support.runs import save_parts as save_run_parts
from tests.support.runs import save_records, start_alone
from tools.export_adapter import main as export
from tools.exports.model_card import draw_curve
from tools.merge_lora import main as merge


@pytest.mark.long
def test_the_card_of_a_run_names_its_data_and_draws_its_loss(tmp_path: Path) -> None:
    save_run_parts(tmp_path / "parts")
    save_records(tmp_path / "parts")
    given = {"train": {"max_steps": 3}, "log": {"every": 1}}
    assert start_alone(tmp_path / "parts", tmp_path / "run", given).code == 0
    out = tmp_path / "exported"
    assert export([str(tmp_path / "run" / "final"), str(out), "--for", "llm"]) == 0
    text = (out / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: transformers" in front and "pipeline_tag: text-generation" in front and "\nlicense:" not in front
    assert str(tmp_path) not in text and body.lstrip().startswith("# exported")
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["sources"]
    for row in ledger:
        assert f"| {row['source']} | {row['size']} | {row['trained']} |" in body
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"Training loss {losses[0]:.4g} at step 1, {losses[-1]:.4g} at step 3" in body and "| step | 3 |" in body


def test_a_folder_without_its_run_has_a_card_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(config_of(save_parts(tmp_path / "parts"), "lora"))
    final = save_final(run, tmp_path)
    assert export([str(final), str(tmp_path / "out"), "--for", "peft"]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in text and "Not recorded beside the exported folder." in text and "## Loss" not in text
    assert "not exported: vision_projector, which the bare language model has not; --inside hf keeps them" in text
    assert export([str(final), str(tmp_path / "out2"), "--inside", "hf"]) == 2
    assert "--inside hf belongs to --for peft" in capsys.readouterr().err
    assert merge([str(final), str(tmp_path / "merged")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "no Hugging Face folder" in last and re.search(r"--for hf .* or --for llm", last)


def test_a_curve_falls_from_left_to_right() -> None:
    lines = draw_curve([(step, 10.0 / step) for step in range(1, 201)]).splitlines()
    columns = [line.partition("|")[2] for line in lines[:-2]]
    assert columns[0].startswith("*") and columns[-1].endswith("*") and all(line.count("*") <= 60 for line in columns)
    assert lines[-1].split() == ["step", "1", "200"]
    assert draw_curve([(1, 2.0), (2, 2.0)]).count("*") == 2
