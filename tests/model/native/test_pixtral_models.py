"""LLaVA with Pixtral and Mistral 3: a run that starts from a folder computes what transformers computes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import ConfigError
from tests.support.published.asking import run_from
from tests.support.published.native_runs import TUNED, BothModels, built, picture, talk
from tests.support.published.pixtral import PIXTRAL_MAKERS, pixtral_reader
from tools.exports.proofs import logits
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables

ODD_SIZES = (
    *((28, 1500), (1333, 777), (56, 56), (10, 10), (97, 61), (1500, 28)),
    *((33, 200), (640, 480), (7, 9), (101, 100), (300, 8), (89, 91)),
)


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("pixtral", True),
        ("mistral3", False),
        pytest.param("pixtral", False, marks=pytest.mark.long),
        pytest.param("mistral3", True, marks=pytest.mark.long),
    ],
)
def test_ids_logits_and_gradients_are_those_of_transformers(tmp_path: Path, name: str, hub: bool) -> None:
    maker, folder = PIXTRAL_MAKERS[name], tmp_path / "published"
    maker.write(folder, hub)
    config = run_from(folder, tmp_path / "run", model={"init_from": str(folder), "dtype": "float32", **TUNED})
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in maker.settings} == maker.settings
    data, model = built(config)
    both = BothModels(folder, data, model, maker.cls.from_pretrained(folder, dtype=torch.float32).eval(), pixtral_reader(folder))
    pictures = [picture(tmp_path, *size) for size in ODD_SIZES]
    records = [*(talk(*pictures[i : i + 2]) for i in range(0, len(pictures), 2)), talk()]
    alone = [data.processor([record], answers=True) for record in records]
    for record, batch in zip(records, alone):
        inputs = both.inputs(record)
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        with torch.no_grad():
            expected = both.theirs(**inputs).logits[0]
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    their_loss, theirs = both.their_gradients(records, alone)
    our_loss, ours = both.our_gradients(data.processor(records, answers=True))
    assert our_loss == pytest.approx(their_loss, rel=1e-5) and ours.keys() == theirs.keys()
    for path, gradient in theirs.items():
        torch.testing.assert_close(ours[path], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=path)


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("pixtral", "config.json", {"vision_feature_select_strategy": "default"}, "a tower that has no CLS row"),
        ("pixtral", "processor_config.json", {"patch_size": 16}, "counts patches of 16 pixels, 1 x 1 .* those of 8 pixels, 1 x 1"),
        ("pixtral", "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "is not PixtralImageProcessor"),
        ("pixtral", "preprocessor_config.json", {"size": {"shortest_edge": 96}}, "names no longest side"),
        ("mistral3", "config.json", {"multimodal_projector_bias": True}, "what is built here has False"),
        ("mistral3", "config.json", {"spatial_merge_size": 3}, "spatial_merge_size = 3 .* has 2"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(tmp_path: Path, name: str, file: str, change: dict[str, Any], said: str) -> None:
    PIXTRAL_MAKERS[name].write(tmp_path / "published", True)
    path = tmp_path / "published" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        built(run_from(tmp_path / "published", tmp_path / "run"))
