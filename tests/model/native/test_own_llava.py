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
from tests.support.native_towers import noise, save_native_tower
from tests.support.published.native import NATIVE_MAKERS
from tests.support.runs import config_of, save_parts, save_records
from trainer.config import RunConfig
from trainer.main import run
from trainer.records.run_data import RunData, open_data
from trainer.runfile.stages import Stage
from trainer.setup import build_run

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


def built(config: RunConfig) -> tuple[RunData, MultimodalLM]:
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return data, build_run(Stage(config, config), data, world).model


def samples_of(data: RunData) -> list[Sample]:
    train, _ = data.training()
    found = [train[i] for i in range(len(train))]
    assert all(isinstance(sample, Sample) for sample in found), found
    return [sample for sample in found if isinstance(sample, Sample)]


def test_a_run_learns(parts: Path, tmp_path: Path) -> None:
    config = own(parts, tmp_path / "run", "naflex", train={"max_steps": 12}, log={"every": 1})
    with one_process() as world:
        assert run(config, world) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 12 and max(losses[-3:]) < 0.6 * losses[0]


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
