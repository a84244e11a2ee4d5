"""Every class of transformers that a run can become: reopened there, it gives our ids, pixels or sound, and logits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from data.media.blob import Blob
from data.media.sound import read_audio
from model.card import ModelCard
from model.config import (
    AudioConfig,
    AudioProjectorConfig,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
    VisionProjectorConfig,
)
from model.errors import ConfigError
from model.exports.hf_classes import CLASSES, HfClass, choose_class
from model.exports.media_facts import MediaFacts
from model.llm.causal_lm import VocabularyLayout
from model.load import load_model
from model.lora import adapted
from model.media_spec import ImageSpec
from model.vision.tower import RESIZE
from tests.support.finals import Run, config_of, save_checkpoint, save_final, save_parts, trained
from tests.support.tiny import SIZES, TOWERS
from tests.support.tiny_audio import save_qwen2_audio
from tools.export_adapter import main as export
from tools.exports.hf_inputs import open_processor, their_inputs
from tools.exports.proofs import sample_clip, sample_picture

SHUFFLE = "pixel_shuffle_mlp"
WRAP = ("<im_start>", "<im_end>")  # any two texts; InternVL has <img> and </img>
TILES: dict[str, Any] = {"image_fit": "tiles", "max_tiles": 4}
ONEVISION: dict[str, Any] = {"image_fit": "anyres", "image_grid": ("1x1...3x3",), "anyres_max": 2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # tower; kind, newline, layer ...; [data]
    "LlavaNext": ("clip", {"newline": True}, {"image_fit": "anyres"}),
    "LlavaNext named grids": ("siglip", {"newline": True}, {"image_fit": "anyres", "image_grid": ("2x1", "1x2", "2x2")}),
    "LlavaOnevision": ("siglip", {"newline": True}, ONEVISION),
    "LlavaOnevision with CLS": ("clip", {"newline": True}, {**ONEVISION, "media_wrap": WRAP}),
    "InternVL": ("internvit", {"kind": SHUFFLE, "layer": -1}, {**TILES, "media_wrap": WRAP}),
    "InternVL one view": ("internvit_rms", {"kind": SHUFFLE}, {"image_fit": "square", "media_wrap": WRAP}),
    "InternVL bare": ("internvit", {"kind": SHUFFLE}, {**TILES, "min_tiles": 2}),
    "Llava of InternViT": ("internvit", {}, {"image_fit": "pad"}),
    "Llava of DINOv2": ("dinov2", {"layer": -1}, {"image_fit": "square"}),
    "Llava of a gated DINOv2": ("dinov2_swiglu", {}, {"image_fit": "pad"}),
    "Llava of registers": ("registers", {"select": "cls_patch"}, {"image_fit": "pad"}),
}
QUICK = ("LlavaNext", "LlavaOnevision", "InternVL", "Llava of DINOv2")


def run_of(folder: Path, case: str, llm: str = "lora") -> Run:
    tower, options, data = CASES[case]
    options = dict(options)
    newline = options.pop("newline", False)
    config = config_of(save_parts(folder / "parts", tower=tower), llm, **options)
    assert config.vision is not None and config.vision_projector is not None
    vision, projector = replace(config.vision, image_size=32), replace(config.vision_projector, newline=newline)
    config = replace(config, vision=vision, vision_projector=projector)
    if "media_wrap" in data:
        config = replace(config, llm=replace(config.llm, new_tokens=WRAP))
    return trained(config, **data)


def hearing(folder: Path, llm: str = "lora") -> Run:
    parts = save_parts(folder / "parts")
    save_qwen2_audio(parts / "audio", seconds=2)
    audio = AudioConfig(str(parts / "audio")), AudioProjectorConfig("linear")
    return trained(ModelConfig(LlmConfig(str(parts / "llm"), llm), None, None, *audio, dtype="float32"), media_wrap=())  # type: ignore[arg-type]


def target_of(folder: Path) -> HfClass:
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return next(target for target in CLASSES if target.name == name)


def pictures(folder: Path) -> Iterator[str]:
    for i, image in enumerate(
        [sample_picture(), Image.new("RGB", (20, 90), (10, 200, 90)), Image.radial_gradient("L").convert("RGB")]
    ):
        image.save(folder / f"{i}.png")
        yield str(folder / f"{i}.png")


def asked(medium: dict[str, str]) -> list[dict[str, Any]]:
    said = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    return [{"role": "user", "content": [medium, {"type": "text", "text": "What is this?"}]}, said]


def our_logits(run: Run, batch: Any) -> torch.Tensor:
    net: Any = run.model.eval()
    with torch.no_grad():
        return net.llm(inputs_embeds=net.embed(batch), position_ids=batch.position_ids).logits


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.long) for case in CASES])
def test_the_class_that_has_these_parts_opens_the_same_model(tmp_path: Path, case: str) -> None:
    run, out = run_of(tmp_path, case), tmp_path / "hf"
    assert export([str(save_final(run, tmp_path)), str(out), "--for", "hf"]) == 0
    assert AutoConfig.from_pretrained(out).architectures == [case.split()[0] + "ForConditionalGeneration"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    reader = open_processor(out, target_of(out))
    for path in pictures(tmp_path):
        messages = asked({"type": "image", "path": path})
        theirs = reader.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        ours = run.processor([{"messages": messages}], answers=True)
        assert theirs["input_ids"].tolist() == ours.input_ids.tolist()
        values = ours.media["image"].values
        assert torch.equal(theirs["pixel_values"].reshape(-1, *values.shape[1:]), values)
        with torch.no_grad():
            torch.testing.assert_close(model(**theirs).logits, our_logits(run, ours), rtol=1e-5, atol=1e-5)


def test_a_run_that_hears_becomes_qwen2_audio(tmp_path: Path) -> None:
    run, out = hearing(tmp_path), tmp_path / "hf"
    assert export([str(save_final(run, tmp_path)), str(out), "--for", "hf"]) == 0
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    reader, clip = AutoProcessor.from_pretrained(out), sample_clip(tmp_path / "clip.wav")
    messages = asked({"type": "audio", "path": str(clip)})
    text = reader.apply_chat_template(messages, tokenize=False)
    wave = read_audio(Blob("clip", str(clip)), 30.0)[1].numpy()
    theirs = reader(text=text, audio=[wave], sampling_rate=16_000, add_special_tokens=False, return_tensors="pt")
    ours = run.processor([{"messages": messages}], answers=True)
    assert theirs["input_ids"].tolist() == ours.input_ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(**theirs).logits, our_logits(run, ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["InternVL", *(pytest.param(case, marks=pytest.mark.long) for case in ("LlavaNext", "hearing"))])
def test_an_adapter_inside_the_exported_folder_is_the_runs(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By PEFT on the class itself; the folder beside it holds all else, and stands without the adapter."""
    run, out = hearing(tmp_path) if case == "hearing" else run_of(tmp_path, case), tmp_path / "peft"
    assert export([str(save_checkpoint(run, tmp_path)), str(out), "--for", "peft", "--inside", "hf"]) == 0
    said = capsys.readouterr().out
    assert f"vllm serve {out / 'base'} --enable-lora --max-lora-rank 8 --lora-modules tuned={out}" in said
    target = target_of(out / "base")
    base = getattr(transformers, target.name).from_pretrained(out / "base", dtype=torch.float32)
    expected = {name.removeprefix("llm.") for name, _ in adapted(run.model)}
    messages = asked({"type": "image", "path": next(pictures(tmp_path))})
    if case == "hearing":
        messages = asked({"type": "audio", "path": str(sample_clip(tmp_path / "clip.wav"))})
    batch = run.processor([{"messages": messages}], answers=True)
    inputs = their_inputs(out / "base", target, {"messages": messages}, batch, run.processor)
    with torch.no_grad():
        without = base.eval()(**inputs).logits
        model = peft.PeftModel.from_pretrained(base, str(out)).eval()
        found = model(**inputs).logits
    adapters = {name for name, module in model.named_modules() if name.endswith(".lora_A")}
    assert len(adapters) == len(expected) > 0 and all("model.language_model." in name for name in adapters)
    torch.testing.assert_close(found, our_logits(run, batch), rtol=1e-5, atol=1e-5)
    assert (without - found).abs().max() > 1e-3


def test_the_language_model_alone_is_always_possible(tmp_path: Path) -> None:
    run, out = run_of(tmp_path, "InternVL"), tmp_path / "llm"
    assert export([str(save_final(run, tmp_path)), str(out), "--for", "llm"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(out)
    merged = load_model(tmp_path / "final", dtype="float32").llm
    asks = [{"role": "user", "content": "What is this?"}]
    ids = tokenizer.apply_chat_template(asks, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    assert ids.tolist() == run.processor([{"messages": asks}]).input_ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "tiles": ({"image_fit": "tiles", "max_tiles": 4}, {}, "clip", "data.image_fit = 'tiles', its processor has one view"),
    "linear": ({}, {"kind": "linear"}, "clip", "model.vision_projector.kind = 'linear'"),
    "registers": ({}, {}, "registers", "has rows before its patches besides CLS"),
    "padded": ({}, {"kind": SHUFFLE}, "internvit", "data.image_fit = 'pad'"),
    "cropped": ({"image_fit": "square"}, {"kind": SHUFFLE}, "internvit", "this tower's own processor crops"),
    "no thumbnail": ({**TILES, "thumbnail": False}, {"kind": SHUFFLE}, "internvit", "data.thumbnail = false"),
    "CLIP shuffled": (TILES, {"kind": SHUFFLE}, "clip", "'clip_vision_model' is not internvl_vision"),
}


def test_what_no_class_expresses_is_refused_with_the_setting_that_stands_in_the_way() -> None:
    for data, options, tower, reason in REFUSED.values():
        projector = VisionProjectorConfig(options.get("kind", "mlp2x_gelu"))
        resize = TOWERS[tower][2]
        spec = ImageSpec(32, 8, 1, "patch", RESIZE[resize], (0.5,) * 3, (0.5,) * 3)
        model = ModelConfig(LlmConfig("llm"), VisionConfig("vision"), projector)
        kind = TOWERS[tower][0].model_type
        configs = {"llm": {"model_type": "llama", **SIZES}, "vision": {"model_type": kind}}
        card = ModelCard(model, LoraConfig(), configs, {"image": spec}, VocabularyLayout())
        facts = {
            "fit": data.get("image_fit", "pad"),
            "max_tiles": data.get("max_tiles", 1),
            "thumbnail": data.get("thumbnail", True),
        }
        with pytest.raises(ConfigError, match=re.escape(reason)):
            choose_class(card, MediaFacts(**facts))
