"""Models that read pictures at their own size: a run that starts from a folder computes what transformers computes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.published.asking import run_from
from tests.support.published.native import NATIVE_MAKERS, NATIVE_NAMES, native_reader
from tests.support.published.native_runs import SIZES, built, picture, talk
from tools.exports.proofs import logits
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables


@pytest.mark.parametrize("hub", [True, False], ids=["hub", "5.x"])
@pytest.mark.parametrize("name", NATIVE_NAMES)
def test_ids_patches_and_logits_are_those_of_transformers(tmp_path: Path, name: str, hub: bool) -> None:
    maker, folder = NATIVE_MAKERS[name], tmp_path / "published"
    maker.write(folder, hub)
    config = run_from(folder, tmp_path / "run")
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in maker.settings} == maker.settings
    data, model = built(config)
    reader, theirs = native_reader(folder, maker), maker.cls.from_pretrained(folder, dtype=torch.float32).eval()
    records = [talk(*(picture(tmp_path, *size) for size in SIZES[i : i + 2])) for i in range(0, len(SIZES), 2)]
    for record in [*records, talk()]:
        batch = data.processor([record], answers=True)
        inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        if "image" in batch.media:
            values = batch.media["image"].values
            assert torch.equal(inputs["pixel_values"], values.expand(-1, -1, 2, -1, -1).flatten(1))
        with torch.no_grad():
            expected = theirs(**inputs).logits[0]
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
