"""Gemma 3 goes back into its own class: with its tied head, merged, as an adapter beside it, and no other class takes its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.processor import load_processor
from model.card import read_card
from model.errors import ConfigError
from model.exports.hf_classes import choose_class
from tests.support.published.asking import run_from
from tests.support.published.gemma import GEMMA_MAKERS, TEMPLATE, TOKENS
from tests.support.published.native_runs import opened_by_transformers, picture, talk
from tools.export_adapter import export
from tools.exports.hf_folder import facts_of
from tools.import_model import main as import_model
from trainer.main import run

MAKER = GEMMA_MAKERS["gemma3"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """published/, ours/ taken from it, out/ written again."""
    root = tmp_path_factory.mktemp("gemma3")
    MAKER.write(root / "published", True)
    assert import_model([str(root / "published"), str(root / "ours")]) == 0
    export(root / "ours", root / "out", "hf")
    return root


def test_a_head_stays_tied_and_signs_stand_alone_in_the_template(exported: Path) -> None:
    """Its processor writes what stands around a picture, where the template writes the sign."""
    names, whole = load_file(exported / "out" / "model.safetensors"), json.loads((exported / "out" / "config.json").read_text())
    assert "language_model.lm_head.weight" not in names and whole["tie_word_embeddings"] is True
    theirs = opened_by_transformers(MAKER, exported / "out").theirs
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight
    template = json.loads((exported / "out" / "chat_template.json").read_text())["chat_template"]
    assert template.endswith(TEMPLATE) and TOKENS["image_token"] not in template
    tokenizer = json.loads((exported / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["extra_special_tokens"] == TOKENS


def test_what_a_class_cannot_express_is_named(exported: Path) -> None:
    card, facts = read_card(exported / "ours"), facts_of(load_processor(exported / "ours"))
    vision, llm, projector = card.model.vision, card.model.llm, card.model.vision_projector
    assert vision is not None and projector is not None
    found = card.hugging_face

    def files(part: str, **changed: Any) -> dict[str, Any]:
        return {"hugging_face": {**found, part: {**found[part], **changed}}}

    cases: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
        "'clip_vision_model' is not siglip_vision_model": ({}, files("vision", model_type="clip_vision_model"), facts),
        "model.vision.layer = -2: this class reads": ({"vision": replace(vision, layer=-2)}, {}, facts),
        "final_norm = false: this class reads its tower": ({"vision": replace(vision, final_norm=False)}, {}, facts),
        "layer_norm_eps = 0.01, by which": ({}, files("vision", layer_norm_eps=0.01), facts),
        r"model.vision.scales = \[48\]: this class": ({"vision": replace(vision, scales=(48,))}, {}, facts),
        "image_attention = 'causal': in this class": ({"llm": replace(llm, image_attention="causal")}, {}, facts),
        "data.image_fit = 'pad': its processor distorts": ({}, {}, replace(facts, fit="pad")),
        r"data.media_wrap = \[\]: its processor writes": ({}, {}, replace(facts, wrap=())),
        "'two_way': only Gemma3For": ({"vision_projector": replace(projector, kind="mlp2x_gelu")}, {}, facts),
    }
    for said, (parts, others, shown) in cases.items():
        with pytest.raises(ConfigError, match=said):
            choose_class(replace(card, model=replace(card.model, **parts), **others), shown)


def test_what_a_run_has_trained_goes_back_merged_and_as_an_adapter(exported: Path, tmp_path: Path) -> None:
    """With the tower frozen; packed. The export itself compares ids, pixels and logits of the class with those of the run."""
    shown = {**picture(tmp_path, 97, 61), "path": "97x61.png"}
    (tmp_path / "train.json").write_text(json.dumps([{**talk(shown), "id": "a"}, {**talk(), "id": "b"}]))
    config = run_from(
        exported / "published",
        tmp_path / "run",
        model={"init_from": str(exported / "published"), "dtype": "float32", "llm": {"tune": "lora"}, "vision": {"tune": "frozen"}},
        data={
            "sources": [{"path": str(tmp_path / "train.json"), "media_root": str(tmp_path)}],
            "workers": 0,
            "on_bad_sample": "error",
            "packing": True,
            "max_length": 128,
        },
        batch={"global_batch_size": 2, "micro_batch_tokens": 256},
        optim={"lr": 1e-2},
        train={"max_steps": 2},
        parallel={"strategy": "ddp"},
        lora={"rank": 2},
    )
    assert run(config) == 0
    final = tmp_path / "run" / "final"
    export(final, tmp_path / "out", "hf")
    before, after = (load_file(root / "model.safetensors") for root in (exported / "published", tmp_path / "out"))
    moved = {key for key, rows in before.items() if not torch.equal(rows, after[key])}
    assert before.keys() == after.keys() and not [key for key in moved if key.startswith("vision_tower")]
    assert {"multi_modal_projector.mm_soft_emb_norm.weight", "multi_modal_projector.mm_input_projection_weight"} <= moved
    export(final, tmp_path / "adapter", "peft", "hf")
    merged = opened_by_transformers(MAKER, tmp_path / "out")
    base = MAKER.cls.from_pretrained(tmp_path / "adapter" / "base", dtype=torch.float32)
    inputs = merged.inputs(talk(picture(tmp_path, 33, 44)))
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**inputs).logits
        torch.testing.assert_close(found, merged.theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_the_language_model_alone_is_a_plain_gemma(exported: Path, tmp_path: Path) -> None:
    """Of text, which it reads as the whole model does."""
    export(exported / "ours", tmp_path / "llm", "llm")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32).eval()
    whole = opened_by_transformers(MAKER, exported / "published").theirs
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
