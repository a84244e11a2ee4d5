"""Idefics3 and SmolVLM: a run that starts from a folder computes and learns what transformers does with it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from data.collate import collate_packed
from data.config import DataConfig
from data.media.idefics_tiles import plan_idefics
from data.media.inside_ids import tile_ids
from data.positions import inside_ids
from model.batch import Batch
from model.config import VisionConfig
from model.errors import ConfigError
from model.media_spec import image_spec, num_tokens
from model.vision.tower import VisionTower, vision_config
from model.vision.tower_kinds import siglip_config
from tests.support.published import tokenizer_with
from tests.support.published.asking import run_from
from tests.support.published.idefics import IDEFICS_MAKERS, SIDE, SIDE_TILES, VISION
from tests.support.published.native import native_reader
from tests.support.published.native_runs import SIZES, BothModels, both_of, built, picture, talk
from tools.exports.proofs import logits
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables


@pytest.fixture(scope="module", params=["smolvlm", pytest.param("idefics3", marks=pytest.mark.long)])
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
    processor = data.processor
    spec, inside = image_spec(processor.specs), inside_ids(processor.tokenizer, processor.specs, processor.config)
    sizes = [(int(2 ** chance.uniform(0, 13.5)), int(2 ** chance.uniform(0, 13.5))) for _ in range(200)]
    counts = [num_tokens(spec, inside.added("image", spec, plan_idefics(size, SIDE, processor.config))) for size in sizes]
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


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "scale": ("config.json", {"scale_factor": 6}, "scale_factor = 6 in config.json; the connector here joins squares of"),
    "tile": ("preprocessor_config.json", {"max_image_size": {"longest_edge": 364}}, "max_image_size = 364 .*image_size = 24"),
    "longest": ("preprocessor_config.json", {"size": {"longest_edge": 100}}, "size = 100 .* is not made of tiles of 24 pixels"),
    "bytes": ("preprocessor_config.json", {"do_rescale": False}, "do_rescale = false"),
    "tokens": ("processor_config.json", {"image_seq_len": 81}, "image_seq_len = 81 .* a view of this model takes 4 tokens"),
    "sign": ("tokenizer_config.json", {"global_image_token": "<all>"}, "global_image_token = '<all>' among the tokenizer's"),
}


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "published"
    IDEFICS_MAKERS["smolvlm"].write(folder, True)
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit_are_refused(smolvlm: Path, tmp_path: Path, case: str) -> None:
    name, changed, message = WRONG[case]
    shutil.copytree(smolvlm, tmp_path / "changed")
    file = tmp_path / "changed" / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ConfigError, match=message):
        run_from(tmp_path / "changed", tmp_path / "run")


def test_one_view_of_each_picture_may_be_asked_for(smolvlm: Path, tmp_path: Path) -> None:
    data, _ = built(run_from(smolvlm, tmp_path / "run", data={"side_tiles": 1}))
    batch = data.processor([asked(picture(tmp_path, 97, 61))], answers=True)
    assert batch.media["image"].values.shape == (1, 3, SIDE, SIDE)
    assert "<fake_token_around_image><global-img><image>" in data.processor.tokenizer.decode(batch.input_ids[0])


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("idefics3", marks=pytest.mark.long)])
def test_pictures_stay_whole_where_their_processor_cuts_none(tmp_path: Path, name: str) -> None:
    """Tokens at 120 sizes, then ids, pixels and the way back: views are resized in the processor's own steps."""
    maker, folder = IDEFICS_MAKERS[name], tmp_path / "published"
    maker.write(folder, True)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_image_splitting": False}))
    data, _ = built(run_from(folder, tmp_path / "run"))
    config, reader, chance = data.processor.config, native_reader(folder, maker), random.Random(0)
    assert (config.side_tiles, config.cut_tiles) == (SIDE_TILES, False)
    sizes = [(int(2 ** chance.uniform(0, 13.5)), int(2 ** chance.uniform(0, 13.5))) for _ in range(120)]
    inside = inside_ids(data.processor.tokenizer, data.processor.specs, config)
    spec = image_spec(data.processor.specs)
    counts = {num_tokens(spec, inside.added("image", spec, plan_idefics(size, SIDE, config))) for size in sizes}
    text = reader.replace_image_token({"rows": [[0]], "cols": [[0]]}, 0)
    assert counts == {len(reader.tokenizer(text, add_special_tokens=False).input_ids)}
    shown = [picture(tmp_path, *size) for size in ((97, 61), (3, 150), (1, 1), (25, 24))]
    record = asked(*shown)
    inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
    batch = data.processor([record], answers=True)
    assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
    assert torch.equal(inputs["pixel_values"][0], batch.media["image"].values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side_tiles": 2}, "side_tiles = 2 has no effect unless data.image_fit = 'idefics'"),
        ({"cut_tiles": False}, "cut_tiles = false has no effect unless data.image_fit = 'idefics'"),
        ({"image_fit": "idefics", "side_tiles": 0}, "side_tiles = 0 is not in"),
        ({"image_fit": "idefics", "side_tiles": 17}, "side_tiles = 17 is not in"),
    ],
)
def test_settings_without_effect_are_named(settings: dict[str, Any], message: str) -> None:
    assert [message in line for line in DataConfig(**settings).problems()] == [True]


def test_a_tokenizer_without_the_sign_around_views_is_refused() -> None:
    with pytest.raises(ConfigError, match="<fake_token_around_image> around every view of a picture, and the tokenizer has no"):
        tile_ids(tokenizer_with("<image>"), "<image>", 2)


def test_a_tower_whose_views_have_no_order_of_their_own_is_refused() -> None:
    """Of 25 x 25 patches rounding gives ten the position of their neighbour, in float32."""
    config = SmolVLMVisionConfig(image_size=100, patch_size=4)
    with pytest.raises(ConfigError, match="25 x 25 patches"):
        siglip_config(config)


def test_views_of_published_sizes_are_read_as_transformers_reads_them() -> None:
    """26 x 26 of Idefics3, 27 x 27 and 32 x 32 of SmolVLM."""
    for grid in (26, 27, 32):
        config = SmolVLMVisionConfig(**{**VISION, "image_size": 4 * grid, "num_hidden_layers": 1})
        theirs = SmolVLMVisionTransformer(config).eval()
        ours = VisionTower({**config.to_diff_dict(), "model_type": "smolvlm_vision"}, VisionConfig("", layer=-1)).eval()
        ours.tower.load_state_dict(theirs.state_dict())
        values = torch.randn(1, 3, 4 * grid, 4 * grid)
        torch.testing.assert_close(ours(values), theirs(values).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_the_rows_before_the_last_norm_are_refused(smolvlm: Path) -> None:
    config = VisionConfig(str(smolvlm), layer=-2)
    with pytest.raises(ConfigError, match="read behind the norm of its last block: set it to -1"):
        VisionTower(vision_config(config), config)
