"""Idefics3 and SmolVLM: a run that starts from a folder computes and learns what transformers does with it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.collate import collate_packed
from data.media.idefics_tiles import plan_idefics
from data.media.inside_ids import tile_ids
from model.batch import Batch
from model.errors import ConfigError
from model.media_spec import image_spec, num_tokens
from tests.support.published.asking import run_from
from tests.support.published.idefics import IDEFICS_MAKERS, SIDE, SIDE_TILES
from tests.support.published.native import native_reader
from tests.support.published.native_runs import SIZES, BothModels, both_of, built, picture, talk
from tools.exports.proofs import logits
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables


@pytest.fixture(scope="module", params=IDEFICS_MAKERS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BothModels]:
    folder = tmp_path_factory.mktemp(request.param)
    yield both_of(IDEFICS_MAKERS[request.param], folder / "published", folder / "run")


def asked(*parts: dict[str, str]) -> dict[str, Any]:
    """A round without pictures, then one with those of `parts`, a text behind each."""
    record = talk(*parts)
    content = record["messages"][2]["content"]
    record["messages"][2]["content"] = content[:-2] + content[-1:] if parts else content
    return record


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Two pictures of odd shapes, one of them too small to be cut but for its enlargement, one alone, and a talk without any."""
    shown = [picture(folder, *size) for size in SIZES]
    return [asked(*shown[:2]), asked(shown[2]), asked(), asked(*shown[3:])]


def test_ids_pixels_and_logits_are_those_of_transformers(models: BothModels, tmp_path: Path) -> None:
    for record in records_of(tmp_path):
        batch, inputs = models.data.processor([record], answers=True), models.inputs(record)
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        if "image" in batch.media:
            assert torch.equal(inputs["pixel_values"][0], batch.media["image"].values)
        with torch.no_grad():
            expected = models.theirs(**inputs).logits[0]
        torch.testing.assert_close(logits(models.ours, batch), expected, rtol=1e-5, atol=1e-5)


def test_loss_and_every_gradient_are_those_of_transformers(models: BothModels, tmp_path: Path) -> None:
    """Of rows that are padded on the right, and of the same samples in one packed row."""
    records = records_of(tmp_path)
    expected = models.their_gradients(records, [models.data.processor([record], answers=True) for record in records])
    samples = [models.data.processor._sample(i, record, True, None, False) for i, record in enumerate(records)]
    for batch in (models.data.processor(records, answers=True), collate_packed(samples, models.data.pad_id)):
        loss, gradients = models.our_gradients(batch)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert gradients.keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


def prompt_inputs(models: BothModels, records: list[dict[str, Any]], batch: Batch) -> dict[str, Tensor]:
    """What transformers' model reads of prompts that are padded on the left: all pictures as if they were the first record's."""
    shown = [found for record in records if "pixel_values" in (found := models.inputs(record))]
    pixels = {key: torch.cat([found[key] for found in shown], dim=1) for key in ("pixel_values", "pixel_attention_mask")}
    assert batch.attention_mask is not None and 0 in batch.attention_mask
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **pixels}


def test_answers_are_those_of_transformers(models: BothModels, tmp_path: Path) -> None:
    models.ours.stop_ids = ()
    records = records_of(tmp_path)
    prompts = models.data.processor(records)
    limits: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = models.theirs.generate(**prompt_inputs(models, records, prompts), **limits)[:, prompts.input_ids.shape[1] :].tolist()
    assert models.ours.generate(prompts, 10) == expected and len({tuple(ids) for ids in expected}) > 1


def test_tokens_of_a_picture_are_as_many_as_the_processor_counts(models: BothModels) -> None:
    data, chance = models.data, random.Random(0)
    spec, inside = image_spec(data.processor.specs), data.processor.media(None).inside  # type: ignore[arg-type]
    sizes = [(int(2 ** chance.uniform(0, 13.5)), int(2 ** chance.uniform(0, 13.5))) for _ in range(200)]
    counts = [num_tokens(spec, inside.added("image", spec, plan_idefics(size, SIDE, SIDE_TILES))) for size in sizes]
    options = {"size": {"longest_edge": SIDE * SIDE_TILES}, "max_image_size": {"longest_edge": SIDE}}
    grids = [models.reader.image_processor.get_number_of_image_patches(height, width, options)[1:] for width, height in sizes]
    texts = [models.reader.replace_image_token({"rows": [[rows]], "cols": [[cols]]}, 0) for rows, cols in grids]
    assert counts == [len(models.reader.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert len(set(counts)) > 3


@pytest.mark.parametrize("name", IDEFICS_MAKERS)
def test_settings_follow_from_a_folder_as_on_the_hub(tmp_path: Path, name: str) -> None:
    maker, folder = IDEFICS_MAKERS[name], tmp_path / "published"
    maker.write(folder, True)
    config = run_from(folder, tmp_path / "run")
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in maker.settings} == maker.settings
    data, model = built(config)
    record = asked(picture(tmp_path, 97, 61))
    reader, theirs = native_reader(folder, maker), maker.cls.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
    torch.testing.assert_close(logits(model, data.processor([record], answers=True)), expected, rtol=1e-5, atol=1e-5)
