"""LLaVA with Pixtral and Mistral 3: a run that starts from a folder computes what transformers computes with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from model.multimodal import MultimodalLM
from tests.support.finals import one_process
from tests.support.native_towers import noise
from tests.support.published.asking import run_from
from tests.support.published.pixtral import PIXTRAL_MAKERS, pixtral_reader
from tools.exports.proofs import logits
from trainer.config import RunConfig
from trainer.records.run_data import RunData, open_data
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage
from trainer.setup import build_run

ODD_SIZES = (
    *((28, 1500), (1333, 777), (56, 56), (10, 10), (97, 61), (1500, 28)),
    *((33, 200), (640, 480), (7, 9), (101, 100), (300, 8), (89, 91)),
)
FULL = {"llm": {"tune": "full"}, "vision": {"tune": "full"}, "vision_projector": {"tune": "full"}}


def built(config: RunConfig) -> tuple[RunData, MultimodalLM]:
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return data, build_run(Stage(config, config), data, world).model.eval()


def talk(folder: Path, *sizes: tuple[int, int]) -> dict[str, Any]:
    """A round without pictures, then one with two of odd sizes, words between them."""
    parts: list[dict[str, str]] = []
    for width, height in sizes:
        file = folder / f"{width}x{height}.png"
        noise(width, height).save(file)
        parts += [{"type": "image", "path": str(file)}, {"type": "text", "text": f"No. {width}"}]
    said: list[tuple[str, list[dict[str, str]]]] = [
        ("user", [{"type": "text", "text": "Hello."}]),
        ("assistant", [{"type": "text", "text": "Yes?"}]),
        ("user", [*parts, {"type": "text", "text": "What?"}]),
        ("assistant", [{"type": "text", "text": "A cat."}]),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize("hub", [True, False], ids=["hub", "5.x"])
@pytest.mark.parametrize("name", PIXTRAL_MAKERS)
def test_ids_logits_and_gradients_are_those_of_transformers(tmp_path: Path, name: str, hub: bool) -> None:
    maker, folder = PIXTRAL_MAKERS[name], tmp_path / "published"
    maker.write(folder, hub)
    config = run_from(folder, tmp_path / "run", model={"init_from": str(folder), "dtype": "float32", **FULL})
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in maker.settings} == maker.settings
    data, model = built(config)
    reader, theirs = pixtral_reader(folder), maker.cls.from_pretrained(folder, dtype=torch.float32).eval()
    records = [talk(tmp_path, *ODD_SIZES[i : i + 2]) for i in range(0, 2 if hub else len(ODD_SIZES), 2)]
    for record in [*records, talk(tmp_path)]:
        batch = data.processor([record], answers=True)
        inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        found = logits(model, batch)
        expected = theirs(**inputs).logits[0]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
        own = model(batch)["text"].sum
        own.backward()
        places = batch.supervised
        torch.nn.functional.cross_entropy(expected[places], batch.labels.flatten()[places], reduction="sum").backward()
    check_gradients(model, dict(theirs.named_parameters()))


def check_gradients(model: MultimodalLM, theirs: dict[str, torch.nn.Parameter]) -> None:
    found = {their_name(name): p.grad for name, p in model.named_parameters()}
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        wanted = theirs[name].grad
        assert gradient is not None and wanted is not None, name
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), msg=name)


def their_name(name: str) -> str:
    for own, other in (
        (r"^llm\.model\.", "model.language_model."),
        (r"^llm\.", ""),
        (r"^vision\.tower\.", "model.vision_tower."),
        (r"^vision_projector\.0\.", "model.multi_modal_projector.linear_1."),
        (r"^vision_projector\.2\.", "model.multi_modal_projector.linear_2."),
        (r"^vision_projector\.merging", "model.multi_modal_projector.patch_merger.merging"),
        (r"^vision_projector\.", "model.multi_modal_projector."),
    ):
        if re.match(own, name):
            return re.sub(own, other, name)
    return name
