"""LLaVA with Pixtral and Mistral 3 go back into their own class: the same tensors, settings, processor files and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.processor import load_processor
from model.card import read_card
from model.errors import ConfigError
from model.exports.hf_classes import choose_class
from model.exports.hf_processors import processor_files
from model.load import load_model
from tests.support.published.native_runs import picture, talk
from tests.support.published.pixtral import PIXTRAL_MAKERS, pixtral_reader
from tools.export_adapter import export
from tools.exports.hf_folder import facts_of
from tools.import_model import main as import_model

NEW = 8
BOTH = pytest.mark.parametrize("name", PIXTRAL_MAKERS)
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A folder with published/ of a maker, ours/ taken from it and out/ written again."""

    @cache
    def made(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        PIXTRAL_MAKERS[name].write(root / "published", True)
        assert import_model([str(root / "published"), str(root / "ours")]) == 0
        export(root / "ours", root / "out", "hf")
        return root

    return made


def settings(folder: Path, file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / file).read_text())
    return found


@BOTH
def test_what_comes_in_goes_out_again_bit_for_bit(exported: Exported, name: str) -> None:
    published, out = exported(name) / "published", exported(name) / "out"
    before, after = (load_file(folder / "model.safetensors") for folder in (published, out))
    assert before.keys() == after.keys()
    assert [key for key, rows in before.items() if not torch.equal(rows, after[key])] == []
    for file, aside in (("preprocessor_config.json", {"do_pad"}), ("processor_config.json", {"image_processor"})):
        theirs, ours = settings(published, file), settings(out, file)
        assert {**ours, **dict.fromkeys(aside)} == {**theirs, **dict.fromkeys(aside)}
    theirs, ours = (PIXTRAL_MAKERS[name].cls.config_class.from_pretrained(folder).to_dict() for folder in (published, out))
    for found in (theirs, ours):
        for part in (found, found["text_config"], found["vision_config"]):
            for key in ("transformers_version", "_name_or_path", "dtype", "architectures", "image_seq_length"):
                part.pop(key, None)
    assert ours == theirs


@BOTH
def test_the_processor_reads_pictures_as_the_published_one(exported: Exported, tmp_path: Path, name: str) -> None:
    record = talk(picture(tmp_path, 97, 61), picture(tmp_path, 10, 130))
    readers = [pixtral_reader(exported(name) / folder) for folder in ("published", "out")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    before, after = (reader.apply_chat_template(record["messages"], **options) for reader in readers)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@BOTH
def test_answers_equal_those_of_transformers(exported: Exported, tmp_path: Path, name: str) -> None:
    """Prompts of no, one and two pictures, padded on the left."""
    model, processor = load_model(exported(name) / "ours"), load_processor(exported(name) / "ours")
    model.stop_ids = ()
    shown = [[], [picture(tmp_path, 44, 31)], [picture(tmp_path, 97, 20), picture(tmp_path, 12, 16)]]
    records = [{"messages": talk(*parts)["messages"][:-1]} for parts in shown]
    together = model.generate(processor(records), max_new_tokens=NEW)
    assert together == [model.generate(processor([record]), max_new_tokens=NEW)[0] for record in records]
    theirs = PIXTRAL_MAKERS[name].cls.from_pretrained(exported(name) / "out", dtype=torch.float32).eval()
    reader, prompts = pixtral_reader(exported(name) / "out"), processor(records)
    pixels = reader._process_images([Image.open(part["path"]) for parts in shown for part in parts], return_tensors="pt")
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, **pixels[0]}
    with torch.no_grad():
        answers = theirs.generate(**inputs, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None)
    assert answers[:, prompts.input_ids.shape[1] :].tolist() == together


def test_what_a_class_cannot_express_is_named(exported: Exported) -> None:
    folder = exported("mistral3") / "ours"
    card, facts = read_card(folder), facts_of(load_processor(folder))
    vision, projector = card.model.vision, card.model.vision_projector
    assert vision is not None and projector is not None
    spec: Any = card.specs["image"]
    other = {**card.hugging_face["vision"], "model_type": "siglip2_vision_model"}
    cases: dict[str, Any] = {
        "model.vision.layer = -2: this class reads its tower's last block": {"vision": replace(vision, layer=-2)},
        r"line_ends = \[\]: PixtralProcessor writes a token behind each line": {"specs": {"image": replace(spec, line_ends=())}},
        "rms_norm_eps = 1e-06, by which this class norms pictures too": {"llm": {**card.hugging_face["llm"], "rms_norm_eps": 1e-6}},
        "'siglip2_vision_model' is not pixtral": {"tower": other},
        "kind = 'pool_mlp': with pixtral, transformers has 'mlp2x_gelu' or": {"projector": replace(projector, kind="pool_mlp")},
    }
    for said, change in cases.items():
        model = replace(card.model, vision=change.get("vision", vision), vision_projector=change.get("projector", projector))
        files = {"vision": change.get("tower", card.hugging_face["vision"]), "llm": change.get("llm", card.hugging_face["llm"])}
        changed = replace(card, model=model, hugging_face={**card.hugging_face, **files}, specs=change.get("specs", card.specs))
        with pytest.raises(ConfigError, match=said):
            choose_class(changed, facts)


def test_a_lower_budget_becomes_the_longest_side(exported: Exported) -> None:
    """Of whole tokens, as sides are rounded up to them: 16 x 16 pixels each."""
    folder = exported("mistral3") / "ours"
    processor = load_processor(folder)
    lower = replace(processor, config=replace(processor.config, fit_max_pixels=70 * 70))
    files = processor_files(choose_class(read_card(folder), facts_of(lower)), processor.specs["image"], facts_of(lower))
    assert files["preprocessor_config.json"]["size"] == {"longest_edge": 64}
