"""Idefics3 and SmolVLM go back into their own class: the same tensors, settings, processor files and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from data.processor import load_processor
from model.card import read_card
from model.errors import ConfigError
from model.exports.hf_classes import choose_class
from tests.support.published.asking import run_from
from tests.support.published.idefics import IDEFICS_MAKERS, SIDE, SIDE_TILES
from tests.support.published.native_runs import picture, talk
from tests.support.tiny_media import folder as folder_of
from tests.support.tiny_media import greys
from tools.export_adapter import export
from tools.exports.hf_folder import facts_of
from tools.import_model import main as import_model
from trainer.main import run

SAMPLING = {"fps": 2, "max_frames": 5, "video_size": {"longest_edge": SIDE * SIDE_TILES}}
BOTH = pytest.mark.parametrize("name", ["smolvlm", pytest.param("idefics3", marks=pytest.mark.long)])
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A folder with published/ of a maker, ours/ taken from it and out/ written again."""

    @cache
    def made(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        IDEFICS_MAKERS[name].write(root / "published", True)
        if name == "smolvlm":
            file = root / "published" / "preprocessor_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "video_sampling": SAMPLING}))
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
    for file in ("preprocessor_config.json", "processor_config.json"):
        theirs = settings(published, file)
        assert {key: settings(out, file)[key] for key in theirs} == theirs
    if name == "smolvlm":
        videos, whole = settings(out, "video_preprocessor_config.json"), settings(out, "processor_config.json")
        assert videos["video_sampling"] == SAMPLING and whole["video_processor"] == videos
    theirs, ours = (IDEFICS_MAKERS[name].cls.config_class.from_pretrained(folder).to_dict() for folder in (published, out))
    for found in (theirs, ours):
        for part in (found, found["text_config"], found["vision_config"]):
            for key in ("transformers_version", "_name_or_path", "dtype", "architectures", "tie_word_embeddings"):
                part.pop(key, None)
        for key in ("max_image_size", "use_base_siglip"):  # nobody reads them
            found["vision_config"].pop(key, None)
        found["text_config"].pop("perceiver_config", None)
    assert ours == theirs


@pytest.mark.long
def test_pictures_that_are_not_cut_go_back_as_that(tmp_path: Path) -> None:
    """The export itself compares ids and pixels with those of the run."""
    IDEFICS_MAKERS["smolvlm"].write(tmp_path / "published", True)
    file = tmp_path / "published" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_image_splitting": False}))
    assert import_model([str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    export(tmp_path / "ours", tmp_path / "out", "hf")
    theirs = settings(tmp_path / "published", "preprocessor_config.json")
    assert {key: settings(tmp_path / "out", "preprocessor_config.json")[key] for key in theirs} == theirs


def test_what_a_class_cannot_express_is_named(exported: Exported) -> None:
    folder = exported("smolvlm") / "ours"
    card, facts = read_card(folder), facts_of(load_processor(folder))
    vision = card.model.vision
    assert vision is not None
    other = {"vision": {**card.hugging_face["vision"], "model_type": "siglip_vision_model"}}
    cases = {
        "model.vision.layer = -2: this class reads its tower's last block": (replace(vision, layer=-2), {}, facts),
        "'siglip_vision_model' is not idefics3_vision, the one tower": (vision, other, facts),
        "data.image_fit = 'pad': its processor reads pictures as 'idefics' does": (vision, {}, replace(facts, fit="pad")),
        r"model.vision.scales = \[48\]: this class sees one size": (replace(vision, scales=(48,)), {}, facts),
    }
    for said, (tower, files, shown) in cases.items():
        changed = replace(card, model=replace(card.model, vision=tower), hugging_face={**card.hugging_face, **files})
        with pytest.raises(ConfigError, match=said):
            choose_class(changed, shown)


@pytest.mark.parametrize("llm", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_what_a_run_has_trained_goes_back(exported: Exported, tmp_path: Path, llm: str) -> None:
    """The export itself compares ids, pixels and logits of the class with those of the run; adapters are merged."""
    folder = exported("smolvlm") / "published"
    shown = {**picture(tmp_path, 97, 61), "path": "97x61.png"}
    moving = {"type": "video", "path": folder_of(tmp_path / "shots", greys(3)).name}
    (tmp_path / "train.json").write_text(json.dumps([{**talk(one), "id": str(i)} for i, one in enumerate((shown, moving))]))
    sources = [{"path": str(tmp_path / "train.json"), "media_root": str(tmp_path)}]
    tuned = {"llm": {"tune": llm}, "vision": {"tune": "full"}, "vision_projector": {"tune": "full"}}
    config = run_from(
        folder,
        tmp_path / "run",
        model={"init_from": str(folder), "dtype": "float32", **tuned},
        data={"sources": sources, "workers": 0, "on_bad_sample": "error"},
        batch={"global_batch_size": 2, "micro_batch_size": 2},
        optim={"lr": 1e-2},
        train={"max_steps": 2},
        parallel={"strategy": "ddp"},
        **({"lora": {"rank": 2}} if llm == "lora" else {}),
    )
    assert run(config) == 0
    export(tmp_path / "run" / "final", tmp_path / "out", "hf")
    before, after = (load_file(root / "model.safetensors") for root in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = {key for key, rows in before.items() if not torch.equal(rows, after[key])}
    for part in ("vision_model", "connector", "text_model"):
        assert any(key.startswith(f"model.{part}.") for key in moved), part
    if llm == "lora":
        beside_its_class(tmp_path)


def beside_its_class(folder: Path) -> None:
    """The adapter as PEFT adds it to the class in base/, against the merged folder in out/."""
    export(folder / "run" / "final", folder / "adapter", "peft", "hf")
    cls = IDEFICS_MAKERS["smolvlm"].cls
    merged = cls.from_pretrained(folder / "out", dtype=torch.float32).eval()
    added = PeftModel.from_pretrained(cls.from_pretrained(folder / "adapter" / "base", dtype=torch.float32), folder / "adapter")
    ids = torch.arange(30, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(added.eval()(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
