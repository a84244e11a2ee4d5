"""Published models as the start of a run: what transformers computes with a folder is what a run that starts from it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from tests.support.finals import one_process
from tests.support.published import MAKERS
from tools.exports.proofs import logits, sample
from trainer.config import RunConfig
from trainer.records.run_data import open_data
from trainer.runfile.load import parse_config
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage
from trainer.setup import build_run


def run_from(folder: Path, output: Path, **sections: Any) -> RunConfig:
    tables = {"output_dir": str(output), "model": {"init_from": str(folder), "dtype": "float32"}, "train": {"max_steps": 0}}
    return parse_config({**tables, **sections}, "test")


@pytest.mark.parametrize("name", MAKERS)
def test_ids_pixels_and_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    maker, folder = MAKERS[name], tmp_path / "published"
    maker.write(folder)
    config = run_from(folder, tmp_path / "run")
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in maker.settings} == maker.settings
    theirs = maker.cls.from_pretrained(folder, dtype=torch.float32).eval()
    reader = AutoProcessor.from_pretrained(folder, backend="pil")
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        model = build_run(Stage(config, config), data, world).model.eval()
    with sample(data.processor) as record:
        batch = data.processor([record], answers=True)
        inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
    assert torch.equal(inputs["pixel_values"].flatten(0, -4), batch.media["image"].values)
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
