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
from safetensors.torch import load_file

from data.config import DataConfig
from data.processor import load_processor
from model.card import read_card
from model.errors import ConfigError
from model.exports import hf_native
from model.exports.hf_classes import choose_class
from model.exports.hf_processors import processor_files
from model.load import load_model
from tests.support.published.families import FAMILIES, families
from tests.support.published.native import EXPERTS, NATIVE_MAKERS, QWEN3_SIZES, QWEN3_TEXT, qwen_vl
from tests.support.published.native_runs import opened_by_transformers, picture, talk
from tools.export_adapter import export
from tools.exports.hf_folder import budget_differences, facts_of
from tools.import_model import main as import_model
from trainer.errors import ProofError

ALL = pytest.mark.parametrize(
    "name", families(("qwen2_5_vl", "pixtral", "mistral3", "smolvlm", "gemma3"), lambda maker: not maker.not_exported)
)
ASIDE = (
    *("transformers_version", "_name_or_path", "dtype", "architectures", "image_seq_length"),
    *("tie_word_embeddings", "norm_topk_prob", "type"),
)
"""Keys of config.json that follow from versions and from other keys."""
NEW = 8


def clips_of(name: str) -> dict[str, Any]:
    """Settings of a processor of videos, with other limits than pictures have."""
    kind = "Qwen3VLVideoProcessor" if name.startswith("qwen3") else "Qwen2VLVideoProcessor"
    return {"video_processor_type": kind, "size": {"shortest_edge": 512, "longest_edge": 5120}, "do_resize": True}


class Exported:
    """A published folder taken in and written out again: published/, ours/ and out/ in `root`."""

    def __init__(self, root: Path, name: str) -> None:
        self.maker = FAMILIES[name]
        self.source, self.ours, self.out = root / "published", root / "ours", root / "out"
        self.maker.write(self.source, True)
        if name in NATIVE_MAKERS:
            (self.source / "video_preprocessor_config.json").write_text(json.dumps(clips_of(name)))
        assert import_model([str(self.source), str(self.ours)]) == 0
        export(self.ours, self.out, "hf")

    def settings(self, file: str) -> list[dict[str, Any]]:
        """A file of settings as published and as written out, and that of the image processor inside or beside it."""
        return [json.loads((folder / file).read_text()) for folder in (self.source, self.out)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    return cache(lambda name: Exported(tmp_path_factory.mktemp(name), name))


@ALL
def test_what_comes_in_goes_out_again_bit_for_bit(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    before, after = (load_file(folder / "model.safetensors") for folder in (found.source, found.out))
    assert before.keys() == after.keys()
    assert [key for key, rows in after.items() if not torch.equal(rows, before[key])] == []
    theirs, ours = (without(found.maker.cls.config_class.from_pretrained(folder).to_dict()) for folder in (found.source, found.out))
    assert ours == theirs


def without(value: Any) -> Any:
    """A configuration without the keys that say nothing of their own."""
    return {key: without(inner) for key, inner in value.items() if key not in ASIDE} if isinstance(value, dict) else value


@ALL
def test_the_processor_reads_pictures_as_the_published_one(exported: Callable[[str], Exported], tmp_path: Path, name: str) -> None:
    found = exported(name)
    record = talk(picture(tmp_path, 97, 61), picture(tmp_path, 10, 130), picture(tmp_path, 10, 10))
    readers = [found.maker.read(folder) for folder in (found.source, found.out)]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    before, after = (reader.apply_chat_template(record["messages"], **options) for reader in readers)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for file, aside in (("preprocessor_config.json", {"do_pad"}), ("processor_config.json", {"image_processor"})):
        if (found.source / file).is_file():
            theirs, ours = found.settings(file)
            assert {key: ours.get(key) for key in theirs.keys() - aside} == {key: theirs[key] for key in theirs.keys() - aside}


@pytest.mark.parametrize("name", families(("qwen2_5_vl",), lambda maker: maker in NATIVE_MAKERS.values()))
def test_the_processor_reads_videos_as_the_published_one(exported: Callable[[str], Exported], name: str) -> None:
    theirs, ours = exported(name).settings("video_preprocessor_config.json")
    assert {key: ours.get(key) for key in theirs} == theirs
    assert json.loads((exported(name).out / "processor_config.json").read_text())["video_processor"] == ours


@ALL
def test_answers_together_equal_each_alone_and_transformers(exported: Callable[[str], Exported], tmp_path: Path, name: str) -> None:
    """Prompts of no, one and two pictures, padded on the left; positions go on behind the largest one of each prompt."""
    found = exported(name)
    model, processor = load_model(found.ours), load_processor(found.ours)
    model.stop_ids = ()
    shown = [[], [picture(tmp_path, 44, 31)], [picture(tmp_path, 97, 20), picture(tmp_path, 12, 16)]]
    records = [talk(*parts) for parts in shown]
    prompts = processor(records)
    together = model.generate(prompts, max_new_tokens=NEW)
    assert together == [model.generate(processor([record]), max_new_tokens=NEW)[0] for record in records]
    assert together == opened_by_transformers(found.maker, found.out).their_answers(records, prompts, NEW)


@pytest.mark.parametrize("name", families(("qwen2_5_vl",), lambda maker: maker in NATIVE_MAKERS.values()))
def test_the_language_model_alone_has_one_axis(
    exported: Callable[[str], Exported], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export(exported(name).ours, tmp_path / "llm", "llm")
    assert "positions of three axes (time, row and column) became one" in capsys.readouterr().out
    assert not {"mrope_section", "mrope_interleaved"} & json.loads((tmp_path / "llm" / "config.json").read_text()).keys()


def test_what_qwen_cannot_express_is_named(exported: Callable[[str], Exported]) -> None:
    folder = exported("qwen2_5_vl").ours
    card, facts = read_card(folder), facts_of(load_processor(folder))
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


def test_what_mistral_cannot_express_is_named(exported: Callable[[str], Exported]) -> None:
    folder = exported("mistral3").ours
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


def test_a_lower_budget_becomes_the_longest_side(exported: Callable[[str], Exported]) -> None:
    """Of whole tokens, as sides are rounded up to them: 16 x 16 pixels each."""
    folder = exported("mistral3").ours
    processor = load_processor(folder)
    lower = replace(processor, config=replace(processor.config, fit_max_pixels=70 * 70))
    files = processor_files(choose_class(read_card(folder), facts_of(lower)), processor.specs["image"], facts_of(lower))
    assert files["preprocessor_config.json"]["size"] == {"longest_edge": 64}
