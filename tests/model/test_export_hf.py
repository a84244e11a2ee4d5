"""The folder for transformers is the model that was trained: reopened there, it gives our ids, pixels, features and logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from model.exports.hf_classes import LLAVA
from model.exports.hf_weights import weights, write_weights
from model.load import load_model
from tests.support.finals import Run, config_of, same, save_checkpoint, save_final, save_parts, trained
from tests.support.tiny_data import talk
from tools.export_adapter import main as export
from tools.exports.proofs import sample_picture
from tools.merge_lora import main as merge


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return save_parts(tmp_path / "parts")


def check_folder(folder: Path, run: Run, tmp_path: Path) -> None:
    """Loads with no key missing or left over; pixels, ids and logits are ours."""
    llava, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reader = AutoProcessor.from_pretrained(folder, backend="pil")
    pictures = [
        sample_picture(),
        Image.new("RGB", (20, 50), (10, 200, 90)),
        Image.radial_gradient("L").resize((64, 31)).convert("RGB"),
    ]
    files = [str(tmp_path / f"{i}.png") for i in range(len(pictures))]
    for image, file in zip(pictures, files):
        image.save(file)
    first = [{"type": "image", "path": files[0]}, {"type": "text", "text": "What is this?"}]
    second = [{"type": "text", "text": "And"}, *({"type": "image", "path": f} for f in files[1:])]
    turns = [("user", first), ("assistant", "A cat."), ("user", second), ("assistant", "Two cars.")]
    as_parts = [
        {"role": role, "content": said if isinstance(said, list) else [{"type": "text", "text": said}]} for role, said in turns
    ]
    ours = run.processor([{"messages": as_parts}], answers=True)
    theirs = reader.apply_chat_template(as_parts, tokenize=True, return_dict=True, return_tensors="pt")
    assert theirs["input_ids"].tolist() == ours.input_ids.tolist()
    assert torch.equal(theirs["pixel_values"], ours.media["image"].values)
    as_text = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]
    text = reader.apply_chat_template(as_text)
    conversation = talk("<image>\nWhat is this?", "A cat.", images=[files[0]])
    again = reader(images=pictures[0], text=text, add_special_tokens=False, return_tensors="pt")
    assert again["input_ids"].tolist() == run.processor([conversation], answers=True).input_ids.tolist()
    net = run.model.eval()
    with torch.no_grad():
        expected = net.llm(inputs_embeds=net.embed(ours), position_ids=ours.position_ids).logits  # type: ignore[operator]
        found = llava.eval()(**theirs).logits
        features = llava.get_image_features(theirs["pixel_values"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    rows = getattr(features, "pooler_output", features)
    rows = torch.cat(list(rows)).flatten(0, -2) if not isinstance(rows, Tensor) else rows.flatten(0, -2)
    torch.testing.assert_close(rows, net._features("image", ours.media["image"]).detach(), rtol=1e-5, atol=1e-5)


CASES = {
    "clip_pad": ("clip", "qwen2", {"image_fit": "pad"}, {}),
    "clip_square_cls": ("clip", "llama", {"image_fit": "square"}, {"select": "cls_patch", "layer": -1}),
    "siglip_pad_tied": ("siglip", "qwen2_tied", {"image_fit": "pad"}, {"layer": 1}),
    "siglip_square": ("siglip", "mistral", {"image_fit": "square"}, {"vision": "full"}),
    "wrapped_first": ("clip", "qwen2", {"placeholders": "first", "media_wrap": ("<im_start>", "<im_end>")}, {"vision": "lora"}),
}


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_the_same_model(tmp_path: Path, case: str, save: Callable[..., Path]) -> None:
    tower, family, data, model_options = CASES[case]
    config = config_of(save_parts(tmp_path, family, tower), **model_options)
    if "media_wrap" in data:
        config = replace(config, llm=replace(config.llm, new_tokens=("<im_start>", "<im_end>")))
    run = trained(config, **data)
    assert export([str(save(run, tmp_path)), str(tmp_path / "hf"), "--for", "hf"]) == 0
    check_folder(tmp_path / "hf", run, tmp_path)


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [("vicuna_v1", "llama"), ("llama2", "llama"), ("auto", "llama3"), ("auto", "qwen3"), ("plain", "bytes")],
)
def test_every_template_is_rendered_alike_by_transformers(tmp_path: Path, template: str, tokenizer: str) -> None:
    """The export refuses to finish where ids, pixels or logits differ."""
    parts = save_parts(tmp_path, tokenizer=tokenizer)
    run = trained(config_of(parts), template=template)
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "hf"), "--for", "hf"]) == 0


def test_pictures_that_were_sent_as_bytes_are_the_same_and_tiles_are_refused(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").mkdir(), (tmp_path / "tiles").mkdir()
    bytes_, tiles = (
        save_final(trained(config_of(parts), **data), tmp_path / name)
        for name, data in [("bytes", {"image_decode": "fast"}), ("tiles", {"image_fit": "tiles", "max_tiles": 4})]
    )
    assert export([str(bytes_), str(tmp_path / "hf"), "--for", "hf"]) == 0
    assert export([str(tiles), str(tmp_path / "hf2"), "--for", "hf"]) == 2
    assert "data.image_fit = 'tiles'" in capsys.readouterr().err and not (tmp_path / "hf2").exists()


BARE = [("gemma2", "caps its logits at 3"), pytest.param("granite", "multiplies its logits by 0.25", marks=pytest.mark.long)]


@pytest.mark.parametrize(("family", "does"), BARE)
def test_logits_that_llavas_class_would_not_make_are_refused_before_anything_is_written(
    tmp_path: Path, family: str, does: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere the language model keeps its own class, and its logits."""
    parts = save_parts(tmp_path, family, vocab_size=448)
    run = trained(config_of(parts))
    final = save_final(run, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("tools.exports.hf_folder.load_model", None)
        assert export([str(final), str(tmp_path / "hf"), "--for", "hf"]) == 2
    said = capsys.readouterr().err
    assert does in said and "LLaVA's classes apply the bare head" in said and not (tmp_path / "hf").exists()
    assert export([str(final), str(tmp_path / "peft"), "--for", "peft"]) == 0
    assert merge([str(final), str(tmp_path / "merged")]) == 0
    # sdpa of transformers 5.17 drops the soft cap of Gemma 2's attention
    base = AutoModelForCausalLM.from_pretrained(parts / "llm", dtype=torch.float32, attn_implementation="eager")
    ids, known = torch.arange(5, 25)[None], run.card.vocabulary.num_known
    models: list[Any] = [peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval(), load_model(tmp_path / "merged").llm]
    with torch.no_grad():
        expected = run.model.eval().llm(input_ids=ids).logits[..., :known]  # type: ignore[operator]
        for model in models:
            found = model(input_ids=ids).logits[..., :known]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_weights_are_rounded_once_and_a_tied_head_is_left_out(tmp_path: Path) -> None:
    run = trained(config_of(save_parts(tmp_path, "qwen2_tied"), dtype="bfloat16"))
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "hf"), "--for", "hf"]) == 0
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert "language_model.lm_head.weight" not in stored
    projector = run.model.get_parameter("vision_projector.2.weight").detach()
    assert torch.equal(stored["multi_modal_projector.linear_2.weight"], projector.bfloat16())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 3 and config["vision_feature_layer"] == -2
    assert config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"] and config["text_config"]["vocab_size"] % 64 == 0


def test_large_weights_are_written_in_shards(parts: Path, tmp_path: Path) -> None:
    folder = save_final(trained(config_of(parts)), tmp_path)
    export([str(folder), str(tmp_path / "hf"), "--for", "hf"])
    expected = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    (tmp_path / "hf" / "model.safetensors").unlink()
    net = load_model(folder)
    write_weights(tmp_path / "hf", weights(LLAVA, trained(config_of(parts)).card, net), max_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    same(dict(LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()), dict(expected))


def test_a_wrong_export_is_a_failed_proof_and_leaves_nothing(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_final(trained(config_of(parts)), tmp_path)

    def swapped(target: Any, card: Any, net: Any) -> Any:
        entries = weights(target, card, net)
        a, b = (f"language_model.model.layers.{i}.self_attn.k_proj.weight" for i in range(2))
        return {**entries, a: entries[b], b: entries[a]}

    def without(target: Any, card: Any, net: Any) -> Any:
        return {n: e for n, e in weights(target, card, net).items() if "post_layernorm" not in n}

    for wrong, reason in ((swapped, "logits differ by"), (without, "does not load every tensor")):
        monkeypatch.setattr("tools.exports.hf_folder.weights", wrong)
        assert export([str(folder), str(tmp_path / "out"), "--for", "hf"]) == 70
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
