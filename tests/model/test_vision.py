"""The tower is built as deep as it is read, and gives the hidden state that the whole one has there."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, SiglipVisionModel

from model.config import VisionConfig
from model.errors import ConfigError
from model.llm.causal_lm import blocks
from model.vision.tower import VisionTower, num_blocks, vision_config, vision_spec
from model.weights.bases import tower_tensors
from model.weights.materialise import Layer, materialise, parameters_on_meta
from tests.support.tiny import TOWER_SIZES, save_tower

TOTAL = TOWER_SIZES["num_hidden_layers"]
CLASSES = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


def tower(folder: Path, layer: int, select: str = "patch") -> VisionTower:
    """Our tower with the folder's weights."""
    config = VisionConfig(str(folder), layer=layer, select=select)  # type: ignore[arg-type]
    with parameters_on_meta():
        built = VisionTower(vision_config(config), config)
    root = torch.nn.ModuleDict({"vision": built})
    layers = [Layer(str(folder), lambda: tower_tensors(str(folder), built, ""))]
    materialise(root, layers, frozen_dtype=torch.float32, device=torch.device("cpu"))
    return built.eval()


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("layer", range(-TOTAL - 1, TOTAL + 1))
def test_every_layer_equals_the_whole_towers_hidden_state(tmp_path: Path, family: str, layer: int) -> None:
    folder = save_tower(tmp_path, family)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = CLASSES[family].from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = whole(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    num_prefix = 1 if family == "clip" else 0
    ours = tower(folder, layer)
    found = ours(pixels)
    assert torch.equal(found, expected[:, num_prefix:])
    assert found.shape == (3, 4, ours.hidden_size)
    assert len(blocks(ours.tower)) == (layer if layer >= 0 else TOTAL + 1 + layer)
    if family == "clip":
        assert torch.equal(tower(folder, layer, "cls_patch")(pixels), expected)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_every_parameter_gets_a_gradient(tmp_path: Path, family: str, layer: int) -> None:
    ours = tower(save_tower(tmp_path, family), layer, "cls_patch")
    ours.requires_grad_(True)
    torch.manual_seed(0)
    (ours(torch.randn(2, 3, 16, 16)) * torch.randn(24)).sum().backward()
    without = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    # Softmax cancels a bias of the keys: its gradient is zero but for rounding, and may be that exactly.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []
    assert not any("post_layernorm" in name or "head" in name for name, _ in ours.named_parameters())


def test_pixels_matter_in_every_row(tmp_path: Path) -> None:
    ours = tower(save_tower(tmp_path, "clip"), -2)
    pixels = torch.randn(1, 3, 16, 16).repeat(2, 1, 1, 1)
    pixels[1, :, 8:, 8:] += 1.0
    a, b = ours(pixels)
    assert ((a - b).abs().amax(-1) > 1e-4).all()


def test_a_layer_that_is_not_there_is_named() -> None:
    assert [num_blocks(layer, 24) for layer in (0, 24, -1, -2, -25)] == [0, 24, 24, 23, 0]
    for layer in (25, -26):
        with pytest.raises(ConfigError, match=rf"model\.vision\.layer = {layer} is not in \[-25, 24\]: the tower has 24 blocks"):
            num_blocks(layer, 24)


def test_a_tower_inside_the_folder_of_a_two_tower_model_is_found(tmp_path: Path) -> None:
    """Hub folders of CLIP hold the text tower as well, and the tower's names behind `vision_model.`."""
    from safetensors.torch import load_file, save_file

    folder = save_tower(tmp_path / "tower", "clip")
    whole = save_tower(tmp_path / "whole", "clip")
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("vision_model."): t for name, t in tensors.items()}
    config = json.loads((folder / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config, "text_config": {}}))
    pixels = torch.randn(1, 3, 16, 16)
    expected = tower(folder, -2)(pixels)
    for prefix in ("", "vision_model."):
        renamed = {prefix + name: t for name, t in plain.items()} | {"text_model.final_layer_norm.weight": torch.ones(2)}
        save_file(renamed, whole / "model.safetensors")
        assert torch.equal(tower(whole, -2)(pixels), expected)


def test_facts_come_from_json_alone(tmp_path: Path) -> None:
    folder = save_tower(tmp_path, "siglip")
    (folder / "model.safetensors").unlink()
    spec = vision_spec(VisionConfig(str(folder)))
    assert (spec.size, spec.patch, spec.num_prefix, spec.resize) == (16, 8, 0, "exact")
    with pytest.raises(ConfigError, match="'cls_patch' has no effect: siglip_vision_model has no CLS row"):
        vision_spec(VisionConfig(str(folder), select="cls_patch"))
    flat = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": flat}))
    assert vision_spec(VisionConfig(str(folder))) == spec
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {**flat, "image_processor_type": "BitX"}}))
    with pytest.raises(ConfigError, match="image processor 'BitX' is not CLIPImageProcessor"):
        vision_spec(VisionConfig(str(folder)))
    (folder / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(ConfigError, match="'swin' is not clip_vision_model"):
        vision_spec(VisionConfig(str(folder)))
