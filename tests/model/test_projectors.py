"""Every projector kind equals its reference, counts its tokens exactly, starts the same everywhere, and is saved and restored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Gemma3Config, Idefics3Config, InternVLConfig, InternVLForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from data.collate import collate
from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX
from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.errors import ConfigError
from model.load import load_model
from model.media_spec import ImageSpec, MediaMeta, num_tokens
from model.multimodal import MultimodalLM
from model.vision.projector import GRID_KINDS, POOLS, SHUFFLES, build_vision_projector, projected_spec
from model.weights.initial_values import initial_tensors
from tests.support.equivalence import step_batches
from tests.support.finals import build, config_of, same, save_checkpoint, save_final, save_parts, trained, values
from tests.support.tiny import LLMS, SIZES, TOWER_SIZES, TOWERS, save_llm, save_tower
from tests.support.trainable import ALONE
from tools.export_adapter import main as export
from trainer.config import OptimConfig
from trainer.distributed.parallelize import replicate
from trainer.optim import build_optimizer, set_learning_rates
from trainer.runfile.part_checks import vision_problems
from trainer.step import StepOptions, train_step

KINDS = {"linear": 16, "mlp3x_gelu": 16, **dict.fromkeys(GRID_KINDS, 4), "resampler": 64}
KINDS |= {kind: 16 // side**2 for kind, side in {**SHUFFLES, **POOLS}.items()}
del KINDS["pixel_shuffle3_linear"], KINDS["pool3_norm_linear"]  # for views of 3 x 3 patches and more
"""Tokens of a view of 4 x 4 patches."""
SPEC = ImageSpec(32, 8, 1, "patch", "exact", (0.0,) * 3, (1.0,) * 3)


def projector(kind: str, **settings: Any) -> nn.Module:
    """With first values, spread so that norms and biases matter too."""
    built = build_vision_projector(VisionProjectorConfig(kind, **settings), 24, 40)
    drawn = initial_tensors("p", built, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(drawn[f"p.{name}"].all() + torch.randn(parameter.shape, generator=generator) * 0.1)
    return built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", POOLS)
def test_pooled_squares_are_those_of_gemma(kind: str, dtype: torch.dtype) -> None:
    """To the bit, in both types."""
    side = POOLS[kind]
    vision = {"hidden_size": 24, "image_size": 12, "patch_size": 1, "num_attention_heads": 4, "intermediate_size": 8}
    config = Gemma3Config(
        vision_config={**vision, "model_type": "siglip_vision_model"},
        text_config={"hidden_size": 40},
        mm_tokens_per_image=(12 // side) ** 2,
    )
    theirs, ours = Gemma3MultiModalProjector(config).to(dtype), projector(kind).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, 144, 24, dtype=dtype)
    assert torch.equal(ours(features), theirs(features))


@pytest.mark.parametrize("kind", SHUFFLES)
def test_shuffles_are_the_connectors_of_idefics3(kind: str) -> None:
    text = {"model_type": "llama", "hidden_size": 40, "num_attention_heads": 4, "vocab_size": 8}
    sizes: dict[str, Any] = {"vision_config": {"hidden_size": 24}, "text_config": text}
    theirs, ours = Idefics3Connector(Idefics3Config(**sizes, scale_factor=SHUFFLES[kind], pad_token_id=0)), projector(kind)
    theirs.modality_projection.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(features(12)), theirs(features(12)))
    counted = num_tokens(projected_spec(replace(SPEC, size=96), VisionProjectorConfig(kind)), MediaMeta())
    assert counted == ours(features(12)).shape[1]


def features(grid: int = 4) -> Tensor:
    return torch.randn(2, grid**2, 24, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_rows_as_are_counted_and_every_parameter_matters(kind: str) -> None:
    config, built = VisionProjectorConfig(kind), projector(kind)
    found = built(features())
    assert found.shape == (2, num_tokens(projected_spec(SPEC, config), MediaMeta()), 40) and found.shape[1] == KINDS[kind]
    (found * torch.randn(40)).sum().backward()
    assert [name for name, p in built.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_depend_on_the_seed_and_the_name_alone(kind: str) -> None:
    built = build_vision_projector(VisionProjectorConfig(kind), 24, 40)
    one, again, other = (initial_tensors("p", built, seed) for seed in (1, 1, 2))
    assert one.keys() == {f"p.{name}" for name, _ in built.named_parameters()}
    for name, parameter in built.named_parameters():
        whole = one[f"p.{name}"].all()
        assert whole.shape == parameter.shape and torch.equal(whole, again[f"p.{name}"].all())
        half = whole.shape[0] // 2
        assert torch.equal(one[f"p.{name}"].read(half, whole.shape[0]), whole[half:])
        is_norm = len(whole.unique()) == 1
        assert torch.equal(whole, other[f"p.{name}"].all()) is is_norm


def test_kernels_and_norms_start_as_torch_starts_them() -> None:
    drawn = initial_tensors("p", projector("conv_mlp"), 5)
    bound = 1 / (24 * 4) ** 0.5
    for name in ("p.0.weight", "p.0.bias"):
        assert bound * 0.8 < drawn[name].all().abs().max() <= bound
    drawn = initial_tensors("p", projector("pixel_shuffle_mlp"), 5)
    assert drawn["p.0.weight"].all().eq(1).all() and drawn["p.0.bias"].all().eq(0).all()
    assert 0.9 < initial_tensors("p", projector("resampler"), 5)["p.queries"].all().std() < 1.1


def pooled(built: Any, rows: Tensor) -> Tensor:
    picture = F.avg_pool2d(rows.transpose(1, 2).unflatten(2, (4, 4)), 2)
    return built[2](F.gelu(built[0](picture.flatten(2).transpose(1, 2))))


def convolved(built: Any, rows: Tensor) -> Tensor:
    picture = rows.transpose(1, 2).unflatten(2, (4, 4))
    found = torch.stack([built[0](picture[:, :, y : y + 2, x : x + 2]).flatten(1) for y in (0, 2) for x in (0, 2)], dim=1)
    return built[2](F.gelu(found))


def shuffled(built: Any, rows: Tensor) -> Tensor:
    """Halved features, four patches side by side, without a norm."""
    picture = rows.unflatten(1, (4, 4)) / 2
    squares = [picture[:, y : y + 2, x : x + 2].flatten(1) for y in (0, 2) for x in (0, 2)]
    return built[2](F.gelu(built[0](torch.stack(squares, dim=1))))


def perceived(built: Any, rows: Tensor) -> Tensor:
    """Idefics' perceiver with the activation of Flamingo, and our projection behind it."""
    config: Any = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False), vision_config=SimpleNamespace(embed_dim=24)
    )
    reference = IdeficsPerceiverResampler(config, embed_dim=24, depth=3, n_heads=8, head_dim=64, n_latents=64)
    state = {"latents": built.queries, "layer_norm.weight": built.norm.weight, "layer_norm.bias": built.norm.bias}
    names = {"0.context_layer_norm": "attention.feature_norm", "0.latents_layer_norm": "attention.query_norm"}
    names |= {f"0.{letter}_proj": f"attention.{letter}_proj" for letter in "qkv"} | {"0.output_proj": "attention.o_proj"}
    names |= {"1.ln": "mlp.0", "1.fc": "mlp.1", "1.c_proj": "mlp.3"}
    for i, layer in enumerate(built.layers):
        reference.blocks[i][1].act = nn.GELU()  # type: ignore[index]
        for theirs, ours in names.items():
            state |= {f"blocks.{i}.{theirs}.{k}": p for k, p in layer.get_submodule(ours).named_parameters()}
    reference.load_state_dict(state)
    return built.proj(reference(rows))


@pytest.mark.parametrize(
    ("kind", "reference"), [("pool_mlp", pooled), ("conv_mlp", convolved), ("vita_mlp", shuffled), ("resampler", perceived)]
)
def test_every_kind_equals_its_reference(kind: str, reference: Any) -> None:
    built = projector(kind)
    torch.testing.assert_close(built(features()), reference(built, features()), rtol=0, atol=1e-5)


def internvl(folder: Path, tower: str) -> tuple[Any, MultimodalLM]:
    """InternVLForConditionalGeneration, and ours with its weights: parts from folders, the projector copied by name."""
    save_llm(folder / "llm", "qwen2")
    save_tower(folder / "vision", tower)
    config_class, _, extra = LLMS["qwen2"]
    vision_class, _, _, variant = TOWERS[tower]
    config = InternVLConfig(
        vision_config=vision_class(**{**TOWER_SIZES, **variant}).to_dict(),
        text_config=config_class(**{**SIZES, **extra}).to_dict(),
        image_token_id=310,
        tie_word_embeddings=False,
    )
    theirs = InternVLForConditionalGeneration(config).eval()
    vision, shuffle = VisionConfig(str(folder / "vision"), layer=-1), VisionProjectorConfig("pixel_shuffle_mlp")
    ours = build_model(ModelConfig(LlmConfig(str(folder / "llm"), "full"), vision, shuffle, dtype="float32")).eval()
    theirs.model.language_model.load_state_dict(ours.llm.model.state_dict())  # type: ignore[union-attr]
    theirs.lm_head.load_state_dict(ours.llm.lm_head.state_dict())  # type: ignore[union-attr]
    theirs.model.vision_tower.load_state_dict(ours.get_submodule("vision.tower").state_dict())
    layers = ("layer_norm", "linear_1", "", "linear_2")
    state = {f"{layers[int(n[0])]}.{n[2:]}": p for n, p in ours.get_submodule("vision_projector").named_parameters()}
    theirs.model.multi_modal_projector.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize("tower", ["internvit", "internvit_rms"])
def test_logits_and_loss_equal_internvl(tmp_path: Path, tower: str) -> None:
    theirs, ours = internvl(tmp_path, tower)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    ids = torch.randint(0, 300, (12,), generator=generator)
    ids[[2, 3, 7]] = 310  # a view of 2 x 2 patches is one token
    media = [SampleMedia("image", pixels[k : k + 1], at, 1, np.arange(1), 1) for k, at in enumerate((2, 3, 7))]
    labels = np.append(ids[1:].numpy(), IGNORE_INDEX)
    labels[:5] = IGNORE_INDEX
    batch = collate([Sample(0, 0, ids.numpy(), labels, {"image": media})], 0)
    with torch.no_grad():
        expected = theirs(input_ids=ids[None], pixel_values=pixels, labels=torch.cat([ids[:1], torch.tensor(labels[:-1])])[None])
        found = ours.llm(inputs_embeds=ours.embed(batch)).logits
        total, count = ours.loss(batch)
    torch.testing.assert_close(found, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(total / count, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "kind", "expected"),
    [
        ({"size": 40}, "pool_mlp", r"makes one token of 2 x 2 patches, but a view has 5 x 5: .* a multiple of 16"),
        ({"size": 24, "patch": 8}, "pixel_shuffle_mlp", "but a view has 3 x 3"),
        ({"select": "cls_patch"}, "conv_mlp", r"takes patches alone: set model.vision.select = 'patch'"),
    ],
)
def test_grids_that_do_not_fit_are_named(spec: dict[str, Any], kind: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        projected_spec(ImageSpec(**{**vars(SPEC), **spec}), VisionProjectorConfig(kind))


@pytest.mark.parametrize(
    ("vision", "settings", "expected"),
    [
        ({"image_size": -1}, {}, "model.vision.image_size = -1 is negative"),
        ({"scales": (0,)}, {}, "model.vision.scales = [0] are not all positive"),
        ({"scales": (32,), "select": "cls_patch"}, {}, "several views have several CLS rows"),
        ({}, {"kind": "mlp"}, "model.vision_projector.kind = 'mlp' is not 'linear' | 'mlp1x_gelu'"),
        ({}, {"kind": "mlp0x_gelu"}, "model.vision_projector.kind = 'mlp0x_gelu' is not"),
        ({}, {"kind": "resampler", "queries": -3}, "model.vision_projector.queries = -3 is negative"),
        ({}, {"queries": 8}, "model.vision_projector.queries = 8 has no effect with kind = 'mlp2x_gelu'"),
        ({"select": "cls_patch"}, {"kind": "pool_mlp"}, "kind = 'pool_mlp' takes patches alone"),
    ],
)
def test_settings_that_cannot_be_are_named_before_a_file_is_read(
    vision: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    model = ModelConfig(LlmConfig("llm"), VisionConfig("vision", **vision), VisionProjectorConfig(**settings))
    found = list(vision_problems(model))
    assert len(found) == 1 and expected in found[0]
    assert list(vision_problems(ModelConfig(LlmConfig("llm"), VisionConfig("v"), VisionProjectorConfig("resampler")))) == []


TUNES = [
    ("siglip", "positions", "frozen", "pool_mlp"),
    ("clip", "positions", "full", "resampler"),
    ("registers", "positions", "frozen", "linear"),
    ("internvit", "positions", "full", "pixel_shuffle_mlp"),
    ("dinov2", "full", "frozen", "conv_mlp"),
    ("internvit_rms", "full", "full", "pixel_shuffle_mlp"),
    ("registers", "lora", "frozen", "pool_mlp"),
    ("dinov2", "frozen", "full", "conv_mlp"),
]


@pytest.mark.parametrize(("tower", "tune", "tuned", "kind"), TUNES)
def test_exactly_the_promised_tensors_change(tmp_path: Path, tower: str, tune: str, tuned: str, kind: str) -> None:
    save_llm(tmp_path / "llm", "qwen2")
    vision = VisionConfig(str(save_tower(tmp_path / "vision", tower)), tune)  # type: ignore[arg-type]
    config = ModelConfig(LlmConfig(str(tmp_path / "llm"), "frozen"), vision, VisionProjectorConfig(kind), dtype="float32")
    model = build_model(config, LoraConfig(rank=2, dropout=0.0))
    if tuned == "frozen":  # a frozen one comes with weights of its own in a real run
        model.get_submodule("vision_projector").requires_grad_(False)
    before = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = build_optimizer(model, config, OptimConfig(lr=0.1, eps=1e-8))
    set_learning_rates(optimizer, 1.0)
    for step in range(2):  # twice: B of LoRA is zero at first, so A gets its first gradient in the second step
        batches = step_batches(step, ALONE, 4, num_tokens(model.specs["image"], MediaMeta()))
        train_step(replicate(model, ALONE), optimizer, batches, ALONE, StepOptions(seed=0, step=step, clip_norm=0.0))
    after = dict([*model.named_parameters(), *model.named_buffers()])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    words = {"positions": "position_embedding", "lora": "lora_", "full": "", "frozen": "nothing"}
    expected = {n for n in before if n.startswith("vision.") and words[tune] in n and not n.endswith("position_ids")}
    expected |= {n for n in before if n.startswith("vision_projector.") and tuned == "full"}
    # The bias of a key cancels in the softmax, so its gradient is rounding or nothing.
    assert changed | {n for n in expected if n.endswith("k_proj.bias") and tune == "full"} == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "positions": ("siglip", {"vision": "positions", "kind": "pool_mlp"}, {"image_size": 32}),
    "scales": ("clip", {"vision": "frozen", "kind": "resampler"}, {"scales": (32,)}),
    "shuffle": ("internvit", {"vision": "full", "kind": "pixel_shuffle_mlp"}, {}),
    "conv": ("registers", {"vision": "lora", "kind": "conv_mlp"}, {}),
}


def ended(folder: Path, name: str) -> Any:
    tower, options, sizes = OPTIONS[name]
    config = config_of(save_parts(folder / "parts", tower=tower), "frozen", **options)
    assert config.vision is not None
    return trained(replace(config, vision=replace(config.vision, **sizes)))


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_trained_is_saved_exported_and_restored(tmp_path: Path, name: str, save: Any) -> None:
    run = ended(tmp_path, name)
    folder = save(run, tmp_path)
    loaded = load_model(folder, merge_lora=False)
    assert loaded.specs == run.model.specs
    same(values(loaded), values(run.model))
    spec: Any = run.model.specs["image"]
    pixels = torch.randn(2, 3, spec.size, spec.size)
    tower, bridge = (run.model.eval().get_submodule(part) for part in ("vision", "vision_projector"))
    torch.testing.assert_close(
        loaded.get_submodule("vision_projector")(loaded.get_submodule("vision")(pixels)), bridge(tower(pixels))
    )
    assert export([str(folder), str(tmp_path / "out")]) == 0
    same(load_file(tmp_path / "out" / "vision_projector.safetensors"), values(bridge))


def test_positions_are_saved_alone_and_as_exactly_as_they_were_trained(tmp_path: Path) -> None:
    run = ended(tmp_path, "positions")
    final = save_final(run, tmp_path)
    assert {p.name for p in final.glob("*.safetensors")} == {"vision.safetensors", "vision_projector.safetensors"}
    found = load_file(final / "vision.safetensors")
    assert {name: t.shape for name, t in found.items()} == {"tower.embeddings.position_embedding.weight": (16, 24)}
    assert found["tower.embeddings.position_embedding.weight"].dtype == torch.float32
    # They go on from there, and what goes on without tuning them keeps them.
    config = replace(run.card.model, init_from=str(final))
    for vision in (config.vision, replace(config.vision, tune="frozen")):
        same(values(build(replace(config, vision=vision)).model), values(run.model))
    with pytest.raises(ConfigError, match=r"image size = 16, but .* was trained with 32"):
        build(replace(config, vision=replace(config.vision, image_size=16)))
