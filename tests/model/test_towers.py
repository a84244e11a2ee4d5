"""Every tower of the table gives what transformers' class gives, whole or sharded, at any size and at several."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from model.config import LlmConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.errors import ConfigError
from model.files.tensor_files import in_memory
from model.vision.multi_scale import merge_scales, scale_tiles
from model.vision.position_embeddings import resize_positions
from model.vision.tower import VisionTower, vision_config, vision_spec
from model.vision.tower_kinds import TOWERS as KINDS
from model.weights.bases import tower_tensors
from model.weights.materialise import Layer, materialise, parameters_on_meta
from tests.support.equivalence import run_steps
from tests.support.ranks import run_ranks
from tests.support.tiny import TOWER_SIZES, TOWERS, save_llm, save_tower
from trainer.distributed.world import World

TOTAL = TOWER_SIZES["num_hidden_layers"]
PREFIX = {"siglip": 0, "registers": 4}
"""Rows in front of the patches, where they are not one."""
ORIGINAL = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("attention.q_norm", "attn.q_norm"),
    ("attention.k_norm", "attn.k_norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
)
"""transformers' names of an InternViT, and OpenGVLab's."""


def built(folder: Path, **settings: Any) -> VisionTower:
    """Our tower with the folder's weights."""
    config = VisionConfig(str(folder), **settings)
    with parameters_on_meta():
        tower = VisionTower(vision_config(config), config)
    root = nn.ModuleDict({"vision": tower})
    layers = [Layer(str(folder), lambda: tower_tensors(str(folder), tower, ""))]
    materialise(root, layers, frozen_dtype=torch.float32, device=torch.device("cpu"))
    return tower.eval()


def theirs(folder: Path, pixels: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """All hidden states of transformers' own class."""
    whole = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        found: Any = whole(pixel_values=pixels, output_hidden_states=True, **options).hidden_states
    return found


def noise(side: int, num: int = 2) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))


def as_published(native: Path, folder: Path, family: str) -> Path:
    """An InternViT folder with OpenGVLab's names and configuration, inside a whole model of theirs."""
    tensors = load_file(native / "model.safetensors")
    for i in range(TOTAL):
        for kind in ("weight", "bias"):
            names = [f"encoder.layer.{i}.attention.{letter}_proj.{kind}" for letter in "qkv"]
            if names[0] in tensors:
                tensors[f"encoder.layers.{i}.attn.qkv.{kind}"] = torch.cat([tensors.pop(name) for name in names])
    renamed: dict[str, Tensor] = {"language_model.norm.weight": torch.ones(2)}
    for name, tensor in tensors.items():
        for old, new in ORIGINAL:
            name = name.replace(old, new)
        renamed[f"vision_model.{name}"] = tensor
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")
    plain = family == "internvit"
    norms = {"norm_type": "layer_norm" if plain else "rms_norm", "qkv_bias": plain, "qk_normalization": not plain}
    vision = {
        "model_type": "intern_vit_6b",
        "auto_map": {"AutoModel": "remote.Code"},
        **TOWER_SIZES,
        **norms,
        "use_flash_attn": True,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "internvl_chat", "vision_config": vision}))
    (folder / "preprocessor_config.json").write_bytes((native / "preprocessor_config.json").read_bytes())
    return folder


@pytest.mark.parametrize("family", TOWERS)
def test_every_layer_equals_transformers(tmp_path: Path, family: str) -> None:
    folder, pixels, prefix = save_tower(tmp_path, family), noise(16), PREFIX.get(family, 1)
    expected = theirs(folder, pixels)
    for layer in range(-TOTAL - 1, TOTAL + 1):
        assert torch.equal(built(folder, layer=layer)(pixels), expected[layer][:, prefix:])
    assert vision_spec(VisionConfig(str(folder))).num_prefix == prefix
    if prefix:
        assert torch.equal(built(folder, select="cls_patch")(pixels), expected[-2])
        assert built(folder, select="cls_patch").blank_length == expected[-2].shape[1]
    assert built(folder).blank_length == 4


@pytest.mark.parametrize("family", TOWERS)
def test_every_parameter_gets_a_gradient(tmp_path: Path, family: str) -> None:
    ours = built(save_tower(tmp_path, family), select="patch" if family == "siglip" else "cls_patch")
    ours.requires_grad_(True)
    (ours(noise(16)) * torch.randn(24, generator=torch.Generator().manual_seed(1))).sum().backward()
    without = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    # Softmax cancels a bias of the keys: its gradient is zero but for rounding, and may be that exactly.
    assert [name for name in without if not name.endswith(("k_proj.bias", "key.bias"))] == []


@pytest.mark.parametrize("family", ["internvit", "internvit_rms"])
def test_a_published_internvit_is_read_through_its_key_map(tmp_path: Path, family: str) -> None:
    native = save_tower(tmp_path / "native", family)
    folder = as_published(native, tmp_path / "published", family)
    assert torch.equal(built(folder, layer=-1)(noise(16)), theirs(native, noise(16))[-1][:, 1:])
    assert (native / "preprocessor_config.json").exists() and vision_spec(VisionConfig(str(folder))).size == 16


def test_a_third_of_a_fused_matrix_can_be_read_by_rows(tmp_path: Path) -> None:
    folder = as_published(save_tower(tmp_path / "native", "internvit"), tmp_path / "published", "internvit")
    rows = tower_tensors(str(folder), built(folder), "")["vision.tower.encoder.layer.1.attention.k_proj.weight"]
    native = load_file(tmp_path / "native" / "model.safetensors")["encoder.layer.1.attention.k_proj.weight"]
    assert rows.shape == (24, 24) and torch.equal(rows.read(5, 9), native[5:9])


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("family", TOWERS)
def test_another_picture_size_equals_interpolating_in_every_forward(tmp_path: Path, family: str, size: int) -> None:
    folder, prefix = save_tower(tmp_path, family, image_size=32), PREFIX.get(family, 1)
    flag = {"interpolate_pos_encoding": True} if family in ("clip", "siglip") else {}
    expected = theirs(folder, noise(size), **flag)[-2][:, prefix:]
    ours = built(folder, image_size=size)
    torch.testing.assert_close(ours(noise(size)), expected, rtol=0, atol=1e-5)
    assert vision_spec(VisionConfig(str(folder), image_size=size)).size == size
    assert ours.blank_length == expected.shape[1]
    # The very same table is left alone.
    assert torch.equal(built(folder, image_size=32)(noise(32)), theirs(folder, noise(32))[-2][:, prefix:])


def test_rows_of_a_resized_table_do_not_depend_on_who_reads_them() -> None:
    table = torch.randn(17, 6)
    kind = KINDS["clip_vision_model"]
    whole = resize_positions(in_memory(table), (37, 6), kind)
    assert torch.equal(torch.cat([whole.read(a, a + 9) for a in range(0, 36, 9)] + [whole.read(36, 37)]), whole.all())
    assert torch.equal(whole.read(0, 1), table[:1])
    for other in ((37, 5), (37, 6, 1)):
        assert resize_positions(in_memory(torch.randn(16, 6)), other, kind).shape == (16, 6)


def plain_s2(tower: nn.Module, pixels: Tensor, sizes: tuple[int, ...], grid: int) -> Tensor:
    """S2 written square by square, as the paper says it."""
    found = []
    for size in sizes:
        picture = F.interpolate(pixels, size=(size, size), mode="bicubic")
        base, lines = sizes[0], []
        for y in range(0, size, base):
            line = [tower(picture[:, :, y : y + base, x : x + base]) for x in range(0, size, base)]
            lines.append(torch.cat([f.transpose(1, 2).unflatten(2, (grid, grid)) for f in line], dim=3))
        found.append(F.interpolate(torch.cat(lines, dim=2), size=(grid, grid), mode="area"))
    return torch.cat(found, dim=1).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_scales_are_s2(tmp_path: Path, family: str) -> None:
    folder = save_tower(tmp_path, family)
    ours, spec = built(folder, scales=(32, 64)), vision_spec(VisionConfig(str(folder), scales=(32, 64)))
    with torch.no_grad():
        found, expected = ours(noise(64)), plain_s2(built(folder), noise(64), (16, 32, 64), 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.shape == (2, 4, ours.hidden_size) and ours.hidden_size == 72 and ours.blank_length == 4
    assert (spec.size, spec.size // spec.patch) == (64, 2)


def test_squares_of_all_sizes_are_put_together_where_they_were_cut() -> None:
    """With a tower that gives each square its pixels back, every size is the picture itself."""
    pixels = noise(8, num=3).round()  # sums of whole numbers are exact in any order
    sizes = (2, 4, 8)
    squares = scale_tiles(pixels, sizes)
    assert squares.shape == (3 * (1 + 4 + 16), 3, 2, 2)
    found = merge_scales(squares.flatten(2).transpose(1, 2), sizes)
    assert torch.equal(found[..., -3:], F.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2))
    assert scale_tiles(pixels.bfloat16(), sizes).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_size": 20}, r"image_size = 20 is no multiple of the tower's patch of 8 pixels"),
        ({"image_size": 4}, r"image_size = 4 is no multiple"),
        ({"scales": (24,)}, r"scales = \[24\] are not multiples of the tower's 16 pixels, growing .*: as \[32, 48\]"),
        ({"scales": (48, 32)}, r"scales = \[48, 32\] are not multiples"),
        ({"scales": (16,)}, r"scales = \[16\] are not multiples"),
        ({"scales": (32,), "select": "cls_patch"}, "several views have several CLS rows"),
    ],
)
def test_sizes_that_cannot_be_are_named(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        vision_spec(VisionConfig(str(save_tower(tmp_path)), **settings))


def test_towers_that_are_not_supported_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_tower(tmp_path)
    for value, expected in (
        ({"model_type": "vit"}, "'vit' is not clip_vision_model | siglip"),
        ({"model_type": "clip_vision_model", "image_size": [16, 32]}, "image_size = .* is no square"),
    ):
        (folder / "config.json").write_text(json.dumps(value))
        with pytest.raises(ConfigError, match=expected):
            vision_spec(VisionConfig(str(folder)))


def run_config(folder: Path, family: str, tune: str, projector: VisionProjectorConfig, **settings: Any) -> ModelConfig:
    llm, vision = LlmConfig(str(folder / "llm"), tune="frozen"), VisionConfig(str(folder / family), tune, **settings)  # type: ignore[arg-type]
    return ModelConfig(llm, vision, projector, dtype="float32")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    save_llm(folder / "llm", "qwen2_tied")
    for family in TOWERS:
        save_tower(folder / family, family)
    return folder


CASES: dict[str, tuple[str, str, VisionProjectorConfig, dict[str, Any]]] = {
    **{family: (family, "full", VisionProjectorConfig(), {}) for family in TOWERS},
    "lora": ("registers", "lora", VisionProjectorConfig(), {}),
    "positions": ("siglip", "positions", VisionProjectorConfig(), {}),
    "positions_3d": ("internvit", "positions", VisionProjectorConfig(), {"layer": -1}),
    "sizes": ("clip", "full", VisionProjectorConfig(), {"image_size": 8, "scales": (16,)}),
    "shuffle": ("internvit", "full", VisionProjectorConfig("pixel_shuffle_mlp"), {"layer": -1}),
    "conv": ("dinov2", "frozen", VisionProjectorConfig("conv_mlp"), {}),
    "resampler": ("clip", "frozen", VisionProjectorConfig("resampler", queries=3), {"select": "cls_patch"}),
}


def run_cases(
    world: World, configs: dict[str, ModelConfig], strategy: str, recompute: bool, micro_batch_size: int, dtype: str = "float32"
) -> dict[str, list[float]]:
    """All in one process per rank: starting it takes longer than a case. Clipping would sum shards in another order."""
    clip_norm = 1.0 if dtype == "float32" else 0.0
    return {
        case: run_steps(world, config, strategy, recompute, micro_batch_size, dtype, clip_norm) for case, config in configs.items()
    }


def configs_of(parts: Path, cases: Iterable[str]) -> dict[str, ModelConfig]:
    found = {}
    for case in cases:
        family, tune, projector, settings = CASES[case]
        found[case] = run_config(parts, family, tune, projector, **settings)
    return found


@pytest.fixture(scope="module")
def steps(parts: Path) -> list[dict[str, list[float]]]:
    """Loss and gradient norm of five steps of every case: alone, and of each of two ranks."""
    configs = configs_of(parts, CASES)
    return [
        run_ranks(run_cases, 1, configs, "ddp", False, 10, seconds=300)[0],
        *run_ranks(run_cases, 2, configs, "fsdp", False, 2, seconds=300),
    ]


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_ranks_take_the_steps_of_one_process(steps: list[dict[str, list[float]]], case: str) -> None:
    alone, first, second = (found[case] for found in steps)
    assert first == second
    torch.testing.assert_close(torch.tensor(first), torch.tensor(alone), rtol=1e-6, atol=1e-7)
    assert alone[0] != alone[2]


def test_a_block_that_owns_parameters_is_recomputed_as_it_was_computed(parts: Path) -> None:
    """InternViT's layer scales belong to the block itself: cast in forward, they must be in backward too."""
    configs = configs_of(parts, ["internvit", "dinov2"])
    kept, recomputed = (run_ranks(run_cases, 1, configs, "ddp", again, 5, "bfloat16")[0] for again in (False, True))
    assert kept == recomputed


@pytest.mark.long
def test_strategies_cast_every_tower_alike_to_the_bit_in_bfloat16(parts: Path) -> None:
    configs = configs_of(parts, CASES)
    ddp, fsdp = (run_ranks(run_cases, 2, configs, s, r, 2, "bfloat16", seconds=300)[0] for s, r in (("ddp", True), ("fsdp", False)))
    for case in CASES:
        assert ddp[case][::2] == fsdp[case][::2]
        torch.testing.assert_close(torch.tensor(ddp[case]), torch.tensor(fsdp[case]), rtol=1e-6, atol=0)
