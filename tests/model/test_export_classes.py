"""Every class of transformers that a run can become: reopened there, it gives our ids, pixels or sound, and logits."""

from __future__ import annotations

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

from model.config import AudioConfig, AudioProjectorConfig, LlmConfig, ModelConfig
from model.exports.hf_classes import CLASSES, HfClass
from model.load import load_model
from tests.support.finals import Run, config_of, save_checkpoint, save_final, save_parts, trained
from tests.support.tiny_audio import save_qwen2_audio
from tools.export_adapter import main as export
from tools.exports.hf_inputs import open_processor
from tools.exports.proofs import sample_clip, sample_picture

SHUFFLE = "pixel_shuffle_mlp"
WRAP = ("<im_start>", "<im_end>")  # any two texts; InternVL has <img> and </img>
TILES = {"image_fit": "tiles", "max_tiles": 4}
ONEVISION = {"image_fit": "anyres", "image_grid": ("1x1...3x3",), "anyres_max": 2}
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
LONG = ("LlavaNext named grids", "Llava of a gated DINOv2", "InternVL bare")


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
    for i, image in enumerate([sample_picture(), Image.new("RGB", (20, 90), (10, 200, 90)), Image.radial_gradient("L").convert("RGB")]):
        image.save(folder / f"{i}.png")
        yield str(folder / f"{i}.png")


def asked(medium: dict[str, str]) -> list[dict[str, Any]]:
    said = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    return [{"role": "user", "content": [medium, {"type": "text", "text": "What is this?"}]}, said]


def our_logits(run: Run, batch: Any) -> torch.Tensor:
    net: Any = run.model.eval()
    with torch.no_grad():
        return net.llm(inputs_embeds=net.embed(batch), position_ids=batch.position_ids).logits


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in CASES])
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
    reader = AutoProcessor.from_pretrained(out)
    assert type(reader).__name__ == "Qwen2AudioProcessor" and reader.audio_token == "<audio>"
