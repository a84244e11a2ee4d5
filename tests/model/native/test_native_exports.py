"""Models that read pictures at their own size go back into their own class: the same tensors, settings and processor files."""

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

from data.config import DataConfig
from data.processor import Processor, load_processor
from model.card import read_card
from model.errors import ConfigError
from model.exports import hf_native
from model.exports.hf_classes import choose_class
from model.load import load_model
from model.multimodal import MultimodalLM
from tests.support.published.native import EXPERTS, NATIVE_MAKERS, QWEN3_SIZES, QWEN3_TEXT, NativeMaker, native_reader, qwen_vl
from tests.support.published.native_runs import picture
from tools.export_adapter import export
from tools.exports.hf_folder import budget_differences, facts_of
from tools.import_model import main as import_model
from trainer.errors import ProofError

QUICK = ("qwen2_5_vl",)
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in NATIVE_MAKERS]
NEW = 8


def clips_of(name: str) -> dict[str, Any]:
    """Settings of a processor of videos, with other limits than pictures have."""
    kind = "Qwen3VLVideoProcessor" if name.startswith("qwen3") else "Qwen2VLVideoProcessor"
    return {"video_processor_type": kind, "size": {"shortest_edge": 512, "longest_edge": 5120}, "do_resize": True}


class Exported:
    """A published folder taken in and written out again: published/, ours/ and out/ in `root`."""

    def __init__(self, root: Path, name: str) -> None:
        self.maker: NativeMaker = NATIVE_MAKERS[name]
        self.source, self.ours, self.out = root / "published", root / "ours", root / "out"
        self.maker.write(self.source, True)
        (self.source / "video_preprocessor_config.json").write_text(json.dumps(clips_of(name)))
        assert import_model([str(self.source), str(self.ours)]) == 0
        export(self.ours, self.out, "hf")

    def opened(self) -> tuple[MultimodalLM, Processor]:
        return load_model(self.ours), load_processor(self.ours)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    return cache(lambda name: Exported(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_in_goes_out_again_bit_for_bit(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    before, after = (load_file(folder / "model.safetensors") for folder in (found.source, found.out))
    assert before.keys() == after.keys()
    assert [key for key, rows in after.items() if not torch.equal(rows, before[key])] == []
    ours, theirs = (facts_of_class(found.maker, folder) for folder in (found.out, found.source))
    assert ours == theirs


def facts_of_class(maker: NativeMaker, folder: Path) -> dict[str, Any]:
    """What transformers reads in config.json, but for what follows from versions and the other keys."""
    config = maker.cls.config_class.from_pretrained(folder)
    parts = {"text": config.text_config.to_dict(), "vision": config.vision_config.to_dict()}
    aside = (
        "transformers_version",
        "_name_or_path",
        "dtype",
        "architectures",
        "tie_word_embeddings",
        "rope_parameters",
        "norm_topk_prob",
    )
    found = {f"{part}.{key}": value for part, keys in parts.items() for key, value in keys.items() if key not in aside}
    rope = config.text_config.rope_parameters
    ids = {key: getattr(config, f"{key}_token_id") for key in ("image", "video", "vision_start", "vision_end")}
    return {**found, **ids, **{key: rope[key] for key in ("mrope_section", "rope_theta", "rope_type")}}


@pytest.mark.parametrize("name", NAMES)
def test_the_processor_reads_pictures_as_the_published_one(exported: Callable[[str], Exported], tmp_path: Path, name: str) -> None:
    found = exported(name)
    record = question(tmp_path, "Hello.", (97, 61), (10, 10))
    theirs, ours = (native_reader(folder, found.maker) for folder in (found.source, found.out))
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    before, after = (reader.apply_chat_template(record["messages"], **options) for reader in (theirs, ours))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    pixels = json.loads((found.out / "preprocessor_config.json").read_text())
    facts = {"min_pixels": 256, "max_pixels": 2560, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    assert {key: pixels[key] for key in facts} == facts
    videos = json.loads((found.out / "video_preprocessor_config.json").read_text())
    assert {key: videos.get(key) for key in clips_of(name)} == clips_of(name)
    assert json.loads((found.out / "processor_config.json").read_text())["video_processor"] == videos


def question(folder: Path, text: str, *sizes: tuple[int, int]) -> dict[str, Any]:
    """A record that asks about pictures of these sizes."""
    parts = [*(picture(folder, *size) for size in sizes), {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}]}


def pictures_of(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [part for record in records for part in record["messages"][0]["content"] if part["type"] == "image"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_together_equal_each_alone_and_transformers(exported: Callable[[str], Exported], tmp_path: Path, name: str) -> None:
    """Prompts of no, one and two pictures, padded on the left; positions go on behind the largest one of each prompt."""
    found = exported(name)
    model, processor = found.opened()
    model.stop_ids = ()
    records = [
        question(tmp_path, "Say it."),
        question(tmp_path, "What is this? A red car on a mat.", (44, 31)),
        question(tmp_path, "And?", (97, 20), (12, 16)),
    ]
    together = model.generate(processor(records), max_new_tokens=NEW)
    assert together == [model.generate(processor([record]), max_new_tokens=NEW)[0] for record in records]
    assert [len(row) for row in together] == [NEW] * 3
    theirs = found.maker.cls.from_pretrained(found.out, dtype=torch.float32).eval()
    reader = native_reader(found.out, found.maker)
    prompts = processor(records)
    pixels = reader.image_processor(images=[Image.open(part["path"]) for part in pictures_of(records)], return_tensors="pt")
    kinds = (prompts.input_ids == theirs.config.image_token_id).int()
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, "mm_token_type_ids": kinds, **pixels}
    with torch.no_grad():
        answers = theirs.generate(**inputs, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None)
    assert answers[:, prompts.input_ids.shape[1] :].tolist() == together


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_pixels_within_rounding(exported: Callable[[str], Exported], tmp_path: Path, name: str) -> None:
    model, processor = exported(name).opened()
    fast = replace(processor, config=replace(processor.config, image_decode="fast"))
    record = question(tmp_path, "And?", (97, 61), (12, 16))
    batches = [reader([record]) for reader in (processor, fast)]
    assert [batch.media["image"].values.dtype for batch in batches] == [torch.float32, torch.uint8]
    with torch.no_grad():
        exact, found = (model.embed(batch) for batch in batches)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_alone_has_one_axis(
    exported: Callable[[str], Exported], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export(exported(name).ours, tmp_path / "llm", "llm")
    assert "positions of three axes (time, row and column) became one" in capsys.readouterr().out
    assert not {"mrope_section", "mrope_interleaved"} & json.loads((tmp_path / "llm" / "config.json").read_text()).keys()


def test_what_the_class_cannot_express_is_named(exported: Callable[[str], Exported]) -> None:
    _, processor = exported("qwen2_5_vl").opened()
    card, facts = read_card(exported("qwen2_5_vl").ours), facts_of(processor)
    vision = card.model.vision
    assert vision is not None
    cases = {
        "model.vision.layer = -2: this class reads its tower's last block": (replace(vision, layer=-2), facts, {}),
        r"positions have one axis": (vision, facts, {"mrope_section": None}),
        r"neither the chat template nor data.media_wrap writes": (vision, replace(facts, around_pictures=()), {}),
    }
    for said, (tower, shown, text) in cases.items():
        llm = {**card.hugging_face["llm"], **text}
        changed = replace(card, model=replace(card.model, vision=tower), hugging_face={**card.hugging_face, "llm": llm})
        with pytest.raises(ConfigError, match=said):
            choose_class(changed, shown)


def test_square_experts_are_refused_as_transformers_reads_them_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It turns a matrix of its files where shapes differ, and there they do not."""
    maker = NATIVE_MAKERS["qwen3_vl_moe"]
    square = {**QWEN3_TEXT, **EXPERTS, "moe_intermediate_size": 16}
    qwen_vl(tmp_path / "published", False, maker.cls, maker.cls.config_class, QWEN3_SIZES, **square)
    assert import_model([str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    with pytest.raises(ConfigError, match="hidden_size = 32 and moe_intermediate_size = 16: a matrix of each expert is square"):
        export(tmp_path / "ours", tmp_path / "out", "hf")
    monkeypatch.setattr(hf_native, "_text_problems", lambda text, form: iter(()))
    with pytest.raises(ProofError, match="logits differ"):
        export(tmp_path / "ours", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_budgets_without_a_setting_in_the_class_are_said() -> None:
    assert list(budget_differences(DataConfig(image_fit="native", fit_max_pixels=9999))) == []
    pictures, videos = budget_differences(DataConfig(image_fit="native", record_max_pixels=5000, video_max_pixels=7000))
    assert "training gave them data.record_max_pixels = 5000 together" in pictures
    assert "training gave them data.video_max_pixels = 7000 together" in videos
