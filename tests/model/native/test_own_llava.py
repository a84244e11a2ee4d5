"""A tower of variable size in a LLaVA of one's own: any projector that fits, any language model, learned in any arrangement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.collate import collate, collate_packed
from data.sample import Sample
from model.batch import Batch
from model.errors import ConfigError
from model.multimodal import MultimodalLM
from model.patch_layout import patch_places
from model.vision.grid_projector import PixelShuffleMlp, PoolMlp
from model.vision.merger import PACKED_KINDS
from tests.support.finals import one_process
from tests.support.published.native import NATIVE_MAKERS
from tests.support.published.native_runs import built
from tests.support.published.native_towers import noise, save_native_tower
from tests.support.ranks import run_ranks
from tests.support.runs import config_of, save_parts, save_records
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.main import run
from trainer.records.run_data import RunData

NATIVE: dict[str, Any] = {"model": {"dtype": "float32", "vision": {"layer": -1}}, "data": {"image_fit": "native"}}
SHAPES = ((31, 20), (9, 60), (44, 44), (16, 8), (50, 23), (90, 31))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of runs, towers beside each other, and records with pictures of mixed sizes."""
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    save_records(folder, 12)
    for i, file in enumerate(sorted((folder / "images").iterdir())):
        noise(*SHAPES[i % len(SHAPES)]).save(file)
    for name in ("naflex", "pixtral"):
        save_native_tower(folder / name, name)
    NATIVE_MAKERS["qwen2_5_vl"].write(folder / "qwen", True)
    return folder


def own(parts: Path, output: Path, tower: str, kind: str = "mlp2x_gelu", **sections: Any) -> RunConfig:
    vision = {"path": str(parts / tower), **sections.pop("vision", {})}
    model = {**NATIVE["model"], "vision": {**NATIVE["model"]["vision"], **vision}, "vision_projector": {"kind": kind}}
    model |= {"llm": {"path": str(parts / "llm"), "tune": "full", **sections.pop("llm", {})}}
    data = {**NATIVE["data"], **sections.pop("data", {})}
    return config_of(parts, output_dir=str(output), model=model, data=data, **sections)


def samples_of(data: RunData) -> list[Sample]:
    train, _ = data.training()
    found = [train[i] for i in range(len(train))]
    assert all(isinstance(sample, Sample) for sample in found), found
    return [sample for sample in found if isinstance(sample, Sample)]


def test_a_run_learns(parts: Path, tmp_path: Path) -> None:
    with one_process() as world:
        found = learned(world, parts, tmp_path / "run", {"train": {"max_steps": 8}})
    assert len(found) == 8 and found[-1][0] < 0.75 * found[0][0]


@pytest.mark.long
def test_sharded_ranks_learn_what_one_process_learns(parts: Path, tmp_path: Path) -> None:
    """Ranks and micro-batches without pictures take part; blocks are computed again in backward, and rows are packed.

    With a projector that joins patches; one without stands among all families.
    """
    # A large eps keeps Adam from turning rounding into signs.
    same = {"kind": "pixel_shuffle_mlp", "train": {"max_steps": 4}, "optim": {"lr": 0.1, "eps": 1.0}, "checkpoint": {"every": 100}}
    sharded = {"strategy": "fsdp", "unit_mib": 0, "activation_checkpointing": "full"}
    packed = {"data": {"packing": True, "max_length": 300}, "batch": {"micro_batch_tokens": 300, "micro_batch_size": None}}
    expected = run_ranks(learned, 1, parts, tmp_path / "alone", same)[0]
    for ranks, sections in ((2, {"parallel": sharded}), (3, {"parallel": sharded, **packed})):
        found = run_ranks(learned, ranks, parts, tmp_path / str(ranks), {**same, **sections})[0]
        assert found == [pytest.approx(step, rel=1e-6) for step in expected]


def learned(world: World, parts: Path, output: Path, sections: dict[str, Any]) -> list[list[float]]:
    """Loss and norm of the gradient of every step of a run on SigLIP2 NaFlex, all of which learns."""
    sections = {"vision": {"tune": "full"}, "log": {"every": 1}, **sections}
    assert run(own(parts, output, "naflex", **sections), world) == 0
    world.barrier()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[line["train/loss"], line["train/grad_norm"]] for line in lines if "train/loss" in line]


@pytest.mark.parametrize(
    ("tower", "kind", "vision"),
    [
        ("naflex", "mlp2x_gelu", {}),
        ("naflex", "pixel_shuffle_mlp", {"tune": "positions"}),
        ("pixtral", "pool_mlp", {"line_ends": ["<|im_start|>", "<|im_end|>"]}),
        ("qwen", "linear", {"layer": -2}),
        ("qwen", "pixel_shuffle_mlp", {}),
    ],
)
def test_packed_samples_are_as_alone(parts: Path, tmp_path: Path, tower: str, kind: str, vision: dict[str, Any]) -> None:
    data, model = built(own(parts, tmp_path / "run", tower, kind, vision={"tune": "full", **vision}))
    samples = samples_of(data)
    assert len({sample.media["image"][0].grid for sample in samples if sample.media}) > 2
    padded, packed = collate(samples, data.pad_id), collate_packed(samples, data.pad_id)
    expected, gradients = loss_and_gradients(model, [collate([sample], data.pad_id) for sample in samples])
    for batch in (padded, packed):
        found, grads = loss_and_gradients(model, [batch])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for name, gradient in grads.items():
            size = max(float(gradients[name].abs().max()), 0.1)
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=2e-6 * size, msg=name)


def loss_and_gradients(model: MultimodalLM, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of batches one after the other, and its gradient by parameter; every trainable one has one."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        term = model(batch)["text"].sum
        term.backward()
        total = total + term.detach()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return total, found


@pytest.mark.parametrize(("kind", "square"), [("pixel_shuffle_mlp", PixelShuffleMlp), ("pool_mlp", PoolMlp)])
def test_projectors_of_squares_compute_the_same_on_packed_patches(kind: str, square: Any) -> None:
    torch.manual_seed(0)
    plain, packed = square(6, 10), PACKED_KINDS[kind](6, 10)
    packed.load_state_dict(plain.state_dict())
    features = torch.randn(1, 16, 6)
    rows, columns = patch_places(4, 4, 2).T
    torch.testing.assert_close(packed(features[:, rows * 4 + columns]), plain(features), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tower", "sections", "expected"),
    [
        ("naflex", {"data": {"image_fit": "pad"}}, "reads pictures at their own size; set data.image_fit = 'native'"),
        ("vision", {}, "'native': the tower of model.vision.path reads squares of 16 pixels"),
        ("vision", {"vision": {"line_ends": ["a", "b"]}, "data": {"image_fit": "pad"}}, "line_ends = .* has no effect: clip"),
        (
            "naflex",
            {"vision": {"image_size": 32}},
            "image_size = 32 has no effect: siglip2_vision_model reads",
        ),
        ("pixtral", {"vision": {"scales": [32]}}, "scales = .* has no effect: pixtral"),
        (
            "naflex",
            {"vision": {"line_ends": ["[X]", "[Y]"]}},
            r"has no token '\[X\]': name it in model.llm.new_tokens",
        ),
        ("naflex", {"vision": {"line_ends": ["[X]"]}}, "is not a pair"),
        ("pixtral", {"vision": {"tune": "positions"}}, "has no position embeddings"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    parts: Path, tmp_path: Path, tower: str, sections: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        built(own(parts, tmp_path / "run", tower, **sections))


@pytest.mark.parametrize("kind", ["conv_mlp", "resampler"])
def test_projectors_that_need_a_square_are_refused(parts: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"kind = '{kind}'.* does not fit a tower that reads pictures at their own size"):
        built(own(parts, tmp_path / "run", "naflex", kind))
