"""The original layouts of LLaVA and InternVL: their loaders' own steps find every tensor, and give the model that was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from model.config import VisionConfig
from model.load import load_model
from model.vision.tower import VisionTower, vision_config
from model.weights.bases import tower_tensors
from tests.support.finals import Run, config_of, same, save_checkpoint, save_final, save_parts, trained, values
from tools.export_adapter import main as export

IMG = ("<img>", "</img>")


def llm_of(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    heads = (f"{prefix}model.layers.", f"{prefix}model.embed_tokens.", f"{prefix}model.norm.", f"{prefix}lm_head.")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(heads)}


def their_projector(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("model.mm_projector."): t for n, t in tensors.items() if n.startswith("model.mm_projector.")}


def stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As LLaVA's builder does with non_lora_trainables.bin."""
    found = {(name[11:] if name.startswith("base_model.") else name): tensor for name, tensor in tensors.items()}
    if any(name.startswith("model.model.") for name in found):
        found = {(name[6:] if name.startswith("model.") else name): tensor for name, tensor in found.items()}
    return found


@pytest.mark.parametrize("inherits", [False, True])
def test_a_lora_run_becomes_llavas_lora_folder(tmp_path: Path, inherits: bool) -> None:
    parts = save_parts(tmp_path / "parts", "llama")
    start = (
        {"init_from": str(save_final(trained(config_of(parts, "full", layer=1), seed=1), tmp_path / "first"))} if inherits else {}
    )
    run, out = trained(config_of(parts, "lora", layer=1, **start), image_fit="pad"), tmp_path / "out"
    assert export([str(save_checkpoint(run, tmp_path)), str(out), "--for", "llava"]) == 0
    config = json.loads((out / "config.json").read_text())
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(out / "base" if inherits else parts / "llm")
    expected = {"model_type": "llava_llama", "mm_vision_tower": str(parts / "vision"), "mm_vision_select_layer": 1}
    expected |= {"mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 24}
    expected |= {"image_aspect_ratio": "pad", "mm_use_im_start_end": False, "mm_patch_merge_type": "flat"}
    assert config.items() >= expected.items()
    projector = values(run.model.get_submodule("vision_projector"))
    beside = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    same(their_projector(stripped(beside)), projector)
    same(their_projector(torch.load(out / "mm_projector.bin", weights_only=True)), projector)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert theirs.config.vocab_size == config["vocab_size"]
    model, ids = peft.PeftModel.from_pretrained(theirs, str(out)).merge_and_unload().eval(), torch.arange(5, 25)[None]
    rows = min(theirs.config.vocab_size, run.card.vocabulary.num_known)
    with torch.no_grad():
        ours = run.model.eval().llm(input_ids=ids).logits[..., :rows]  # type: ignore[operator]
        torch.testing.assert_close(model(input_ids=ids).logits[..., :rows], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vision", ["frozen", "full"])
def test_a_whole_run_becomes_llavas_whole_folder(tmp_path: Path, vision: str) -> None:
    parts = save_parts(tmp_path / "parts", "llama")
    data = {"image_fit": "anyres", "anyres_max": 4} if vision == "full" else {}
    config = config_of(parts, "full", vision)
    assert config.vision_projector is not None
    config = replace(config, vision_projector=replace(config.vision_projector, newline=bool(data)))
    run, out = trained(config, **data), tmp_path / "out"
    assert export([str(save_final(run, tmp_path)), str(out), "--for", "llava"]) == 0
    stored, told = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert told["architectures"] == ["LlavaLlamaForCausalLM"] and told.get("unfreeze_mm_vision_tower", False) is (vision == "full")
    net = values(load_model(tmp_path / "final"))
    same(llm_of(stored), {name.removeprefix("llm."): t for name, t in net.items() if name.startswith("llm.")})
    projector = {n.removeprefix("vision_projector."): t for n, t in net.items() if n.startswith("vision_projector.")}
    if data:
        assert (told["image_aspect_ratio"], told["mm_patch_merge_type"]) == ("anyres_max_4", "spatial_unpad")
        assert told["image_grid_pinpoints"][:2] == [[16, 32], [32, 16]]  # width first
        assert torch.equal(stored["model.image_newline"], projector.pop("image_newline"))
    same(their_projector(stored), projector)
    inside = {n.removeprefix("model.vision_tower.vision_tower."): t for n, t in stored.items() if "vision_tower" in n}
    assert bool(inside) == (vision == "full")
    if inside:
        clip = CLIPVisionModel(CLIPVisionConfig.from_pretrained(told["mm_vision_tower"])).eval()
        same_names = {name.removeprefix("vision_model."): tensor for name, tensor in inside.items()}
        assert clip.load_state_dict(same_names, strict=True)
        pixels = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            seen = clip(pixels, output_hidden_states=True).hidden_states[told["mm_vision_select_layer"]][:, 1:]
            torch.testing.assert_close(seen, run.model.eval().vision(pixels), rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    assert AutoTokenizer.from_pretrained(out)("A cat.")["input_ids"] == run.processor.tokenizer("A cat.")["input_ids"]


def test_what_llava_cannot_load_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    intern, siglip = save_parts(tmp_path / "intern", "llama", "internvit"), save_parts(tmp_path / "siglip", "llama", "siglip")
    qwen, tuned = save_parts(tmp_path / "qwen"), save_parts(tmp_path / "tuned", "llama")
    cases = [
        (config_of(intern, "lora"), {}, "'internvl_vision' is a tower that LLaVA cannot load"),
        (config_of(siglip, "full"), {}, "LLaVA-NeXT's SigLIP has 27 x 27 patches"),
        (config_of(qwen, "lora"), {}, "LLaVA loads LoRA folders of llama | mistral | mixtral | gemma, not of 'qwen2'"),
        (config_of(tuned, "lora", "full"), {}, "model.vision.tune = 'full': LLaVA's loader of LoRA folders"),
        (config_of(tuned, "full"), {"image_fit": "tiles", "max_tiles": 2}, "data.image_fit = 'tiles'"),
    ]
    for i, (config, data, reason) in enumerate(cases):
        final = save_final(trained(config, **data), tmp_path / str(i))
        assert export([str(final), str(tmp_path / "out"), "--for", "llava"]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def interns(folder: Path, tower: str = "internvit", family: str = "qwen2_tied") -> Run:
    config = config_of(save_parts(folder / "parts", family, tower), "lora", "full", kind="pixel_shuffle_mlp", layer=-1)
    config = replace(config, llm=replace(config.llm, new_tokens=IMG))
    return trained(config, image_fit="tiles", max_tiles=3, media_wrap=IMG)


@pytest.mark.parametrize("tower", [pytest.param("internvit", marks=pytest.mark.long), "internvit_rms"])
def test_a_run_goes_into_internvls_original_layout(tmp_path: Path, tower: str) -> None:
    """The tower is read back from the published names; the head is there though it is tied; the placeholder has InternVL's name."""
    run, out = interns(tmp_path, tower), tmp_path / "out"
    assert export([str(save_final(run, tmp_path)), str(out), "--for", "internvl"]) == 0
    stored, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    net = load_model(tmp_path / "final")
    expected = {"model_type": "internvl_chat", "ps_version": "v2", "select_layer": -1, "use_thumbnail": True}
    expected |= {"dynamic_image_size": True, "max_dynamic_patch": 3, "min_dynamic_patch": 1, "force_image_size": 16}
    assert config.items() >= expected.items() and config["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert torch.equal(stored["language_model.lm_head.weight"], stored["language_model.model.embed_tokens.weight"])
    llm = llm_of(stored, "language_model.")
    same({n: t for n, t in llm.items() if n != "lm_head.weight"}, values(net.llm))
    mlp = {n.removeprefix("mlp1."): t for n, t in stored.items() if n.startswith("mlp1.")}
    same(mlp, values(net.get_submodule("vision_projector")))
    assert any(".attn.qkv." in name for name in stored) and not any("q_proj" in n for n in stored if n.startswith("vision"))
    there = VisionConfig(str(out), layer=-1)
    again = VisionTower(vision_config(there), there)
    found = {n.removeprefix("vision.tower."): rows.all() for n, rows in tower_tensors(str(out), again, "").items()}
    same(found, values(net.get_submodule("vision.tower")))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == run.processor.template.placeholder_ids["image"]


def test_internvls_layout_needs_its_wrap_and_its_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = save_parts(tmp_path / "parts", "llama", "internvit")
    bare = trained(config_of(parts, "lora", kind="pixel_shuffle_mlp"), image_fit="tiles", max_tiles=2)
    assert export([str(save_final(bare, tmp_path)), str(tmp_path / "out"), "--for", "internvl"]) == 2
    assert "data.media_wrap = []: InternVL's own code writes ['<img>', '</img>']" in capsys.readouterr().err
