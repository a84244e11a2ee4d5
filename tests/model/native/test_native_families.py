"""Models that read pictures at their own size: a run that starts from a folder computes what transformers computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model.multimodal import MultimodalLM
from tests.support.finals import one_process
from tests.support.published.asking import run_from
from tests.support.published.native import NATIVE_MAKERS, native_reader
from tools.exports.proofs import logits
from trainer.config import RunConfig
from trainer.records.run_data import RunData, open_data
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage
from trainer.setup import build_run

SIZES = ((1, 54), (28, 1500), (1333, 777), (56, 56), (10, 10), (97, 61))


def built(config: RunConfig) -> tuple[RunData, MultimodalLM]:
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return data, build_run(Stage(config, config), data, world).model.eval()


def picture(folder: Path, width: int, height: int) -> dict[str, str]:
    file = folder / f"{width}x{height}.png"
    Image.effect_noise((width, height), 90).convert("RGB").save(file)
    return {"type": "image", "path": str(file)}


def talk(*parts: dict[str, str]) -> dict[str, Any]:
    """A round without pictures, then one with those of `parts`, words between them."""
    words = [{"type": "text", "text": f"No. {i}"} for i in range(len(parts))]
    mixed = [item for pair in zip(parts, words) for item in pair]
    said = [("user", "Hello."), ("assistant", "Yes?"), ("user", None), ("assistant", "A cat.")]
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": text}] if text else [*mixed, {"type": "text", "text": "What?"}]}
            for role, text in said
        ]
    }


@pytest.mark.parametrize("hub", [True, False], ids=["hub", "5.x"])
@pytest.mark.parametrize("name", NATIVE_MAKERS)
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
