"""bfloat16: every projector kind, blank and very short media among them, steps as float32 does and alike on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.collate import collate
from data.sample import Sample, SampleMedia
from model.audio.projector import convolved
from model.batch import IGNORE_INDEX
from model.build import assemble
from model.card import make_card
from model.config import (
    AudioConfig,
    AudioProjectorConfig,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
    VisionProjectorConfig,
)
from model.llm.causal_lm import VocabularyLayout
from model.media_spec import AudioSpec, MediaMeta, num_tokens, row_width, token_rows
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.equivalence import noise
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from tests.support.tiny_audio import save_whisper
from trainer.config import OptimConfig
from trainer.distributed.parallelize import replicate
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

PAIRS = (
    ("linear", "linear"),
    ("mlp2x_gelu", "mlp2x_gelu"),
    ("pool_mlp", "pool_mlp"),
    ("conv_mlp", "conv_mlp"),
    ("pixel_shuffle_mlp", "conv_mlp"),
    ("resampler", "conv_mlp"),
    ("vita_mlp", "vita_conv"),
)
"""Kinds of the vision and the audio projector: together every kind there is."""
FRAMES = (1, 2, 3, 37)
"""Of the clips: one mel frame becomes one row of the encoder, and rows of one position are where kernels go wrong."""
ALONE = World(0, 0, 1, torch.device("cpu"))
ULP = 2**-8


def litter() -> None:
    """Leave large numbers in freed memory: a kernel that reads what it never wrote finds them."""
    _ = [torch.full((5000, 7), 1e30) for _ in range(4)]


def backward(layer: nn.Conv1d, rows: Tensor) -> list[Tensor]:
    """The output of `convolved`, and the gradients of a weighted sum of it: of the rows, the kernel and the bias."""
    rows = rows.detach().requires_grad_()
    litter()
    out = convolved(layer, rows)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), rows.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(5, 2), (3, 2), (3, 1)])
def test_a_convolution_of_any_width_has_the_gradients_of_double_precision(kernel: int, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for width in range(1, 9):
        for num_rows in (1, 3):
            layer = nn.Conv1d(24, 32, kernel, stride, kernel // 2).to(dtype)
            exact = nn.Conv1d(24, 32, kernel, stride, kernel // 2).double()
            exact.load_state_dict(layer.state_dict())
            rows = torch.randn(num_rows, 24, width).to(dtype)
            wanted = exact(rows.double())
            found, expected = backward(layer, rows), backward(exact, rows.double())
            torch.testing.assert_close(expected[0], wanted.detach(), rtol=0, atol=1e-12)  # the padding changes nothing
            tolerance = 2 * ULP if dtype == torch.bfloat16 else 1e-6
            for one, other in zip(found, expected):
                assert (one.double() - other).norm() <= tolerance * other.norm(), f"width {width}, {num_rows} rows"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    save_whisper(folder / "audio", seconds=1)
    return folder


def model_of(folder: Path, kinds: tuple[str, str], dtype: torch.dtype) -> tuple[MultimodalLM, ModelConfig]:
    """All parts learn, clips are heard in rows of their own length."""
    config = ModelConfig(
        LlmConfig(str(folder / "llm"), "full"),
        VisionConfig(str(folder / "vision"), "full"),
        VisionProjectorConfig(kinds[0]),
        AudioConfig(str(folder / "audio"), "full", window="clip"),
        AudioProjectorConfig(kinds[1]),
    )
    card = make_card(config, LoraConfig(), VocabularyLayout())
    model = assemble(card, dtype)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=dtype, device=ALONE.device)
    return model.train(), config


def samples(model: MultimodalLM) -> list[Sample]:
    """Text alone, a picture, or a clip, in turn; every clip is one of FRAMES long."""
    rng, found = np.random.default_rng(4), []
    width, spec = num_tokens(model.specs["image"], MediaMeta()), model.specs["audio"]
    assert isinstance(spec, AudioSpec)
    for i in range(3 * len(FRAMES)):
        media: dict[str, list[SampleMedia]] = {}
        length = 0
        if i % 3 == 1:
            length, pixels = width, noise(rng)
            media["image"] = [SampleMedia("image", pixels, 1, width, np.arange(width), width)]
        elif i % 3 == 2:
            frames = FRAMES[i // 3]
            rows = token_rows(spec, MediaMeta(num_frames=frames), per_row := row_width(spec, frames))
            values, length = torch.from_numpy(rng.standard_normal((1, spec.num_mels, frames))).float(), len(rows)
            media["audio"] = [SampleMedia("audio", values, 1, length, rows, per_row, (frames,))]
        ids = rng.integers(1, 300, length + 7)
        labels = np.full(len(ids), IGNORE_INDEX)
        labels[-4:-1] = ids[-3:]
        found.append(Sample(i, 0, ids, labels, media))
    return found


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_a_blank_batch_gives_every_part_zeros_and_real_ones_float32s_gradients(parts: Path, kinds: tuple[str, str]) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = model_of(parts, kinds, dtype)
        wrapped: Any = replicate(model, ALONE)
        litter()
        wrapped(collate([], 0))["text"].sum.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
        for sample in samples(model):
            litter()
            wrapped(collate([sample], 0))["text"].sum.backward()
        found[dtype] = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    exact, rounded = found.values()
    for part in ("vision", "vision_projector", "audio", "audio_projector", "llm"):
        own = [name for name in exact if name.startswith(f"{part}.")]
        true, rough = (torch.cat([gradients[name].flatten() for name in own]) for gradients in (exact, rounded))
        assert (rough - true).norm() < 0.06 * true.norm(), part


def losses(world: World, folder: Path) -> list[list[float]]:
    """Loss, gradient norm and whether the update was skipped, of two steps with each of PAIRS, one sample per micro-batch."""
    found = []
    for kinds in PAIRS:
        model, config = model_of(folder, kinds, torch.bfloat16)
        wrapped = replicate(model, world)
        optimizer = build_optimizer(model, config, OptimConfig(lr=0.1, eps=1.0))
        set_learning_rates(optimizer, 1.0)
        numbers = []
        for step in range(2):
            batches = [collate([sample], 0) for sample in samples(model)[world.rank :: world.size]]
            litter()
            result = train_step(wrapped, optimizer, batches, world, StepOptions(seed=0, step=step, clip_norm=1.0))
            numbers += [world.sum(result.losses.sum()).item(), result.grad_norm.item(), result.skipped.item()]
        found.append(numbers)
    return found


@pytest.mark.long
def test_three_ranks_step_as_one_process_with_every_projector_kind(parts: Path) -> None:
    (alone,) = run_ranks(losses, 1, parts)
    ranks = run_ranks(losses, 3, parts)
    assert ranks[0] == ranks[1] == ranks[2]
    for kinds, one, three in zip(PAIRS, alone, ranks[0]):
        assert not any(one[2::3]) and not any(three[2::3]), f"{kinds}: an update was skipped"
        torch.testing.assert_close(torch.tensor(three), torch.tensor(one), rtol=ULP, atol=0, msg="-".join(kinds))
