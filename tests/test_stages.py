"""A curriculum: every stage is a run of its own that starts from the one before, wherever it was killed; the file is checked whole."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import load_model
from model.config import ConfigError
from tests.finals import same, values
from tests.ranks import run_ranks
from tests.runs import Start, failure_of, merged, start, start_alone, tables
from tests.test_config import MINIMAL
from trainer.runfile import parse_config
from trainer.schema import to_tables, to_toml
from trainer.stages import places_of

ALIGN: dict[str, Any] = {
    "name": "align",
    "model": {"llm": {"tune": "frozen"}, "vision": {"tune": "frozen"}},
    "train": {"max_steps": 2},
}
ADAPT: dict[str, Any] = {"name": "adapt", "model": {"llm": {"tune": "lora"}, "vision": {"tune": "lora"}}, "train": {"max_steps": 2}}
GO_ON: dict[str, Any] = {"name": "go_on", "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "optim": {"lr": 5e-3}}
WHOLE: dict[str, Any] = {"name": "whole", "model": {"vision_projector": {"tune": "frozen"}}, "seed": 7}
AGAIN: dict[str, Any] = {"name": "again", "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "lora": {"rank": 3}}
FIVE: dict[str, Any] = {
    "lora": {"rank": 2, "dropout": 0.3},
    "train": {"max_steps": 3},
    "stage": [ALIGN, ADAPT, GO_ON, WHOLE, AGAIN],
}


def finals(run: Path) -> dict[str, dict[str, bytes]]:
    """Bytes of every final/ by stage, and of the run's."""
    folders = {path.parent.name: path for path in run.glob("stages/*/final")} | {"run": run / "final"}
    return {n: {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"} for n, folder in folders.items()}


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five stages, without a stop."""
    run = tmp_path_factory.mktemp("curriculum") / "run"
    begun = start_alone(parts, run, FIVE)
    assert begun.code == 0, begun.said
    return run


def test_every_stage_has_its_final_and_the_last_is_that_of_the_run(whole: Path) -> None:
    found = finals(whole)
    assert set(found) == {"01-align", "02-adapt", "03-go_on", "04-whole", "05-again", "run"}
    assert found["run"] == found["05-again"] and "lora.safetensors" in found["run"]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    names = ["align"] * 2 + ["adapt"] * 2 + ["go_on"] * 3 + ["whole"] * 3 + ["again"] * 3
    assert [(line["step"], line["stage"]) for line in lines] == list(enumerate(names, 1))
