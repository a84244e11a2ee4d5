"""Useful operations of towers that read pictures at their own size are those that torch counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.vision.native_tower import NativeTower
from model.vision.patch_tower import PatchLinear
from tests.support.published.asking import run_from
from tests.support.published.families import FAMILIES
from tests.support.published.native_runs import TUNED, built, picture, talk
from tools.devicechecks.flops import media_flops, native_forward


def of_attention(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Scores and the sum of values: torch counts this kernel of CPUs not by itself."""
    return 4 * math.prod(query) * key[2]


KERNELS: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_attention}


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "mistral3", *(pytest.param(n, marks=pytest.mark.long) for n in ("qwen3_vl", "pixtral"))]
)
@pytest.mark.parametrize("learns", [False, True])
def test_operations_are_those_that_torch_counts(tmp_path: Path, name: str, learns: bool) -> None:
    """To the last one, but for the gradient of pixels, which nobody needs."""
    FAMILIES[name].write(tmp_path / "published", True)
    tuned = TUNED if learns else {**TUNED, "vision": {"tune": "frozen"}}
    folder = tmp_path / "published"
    data, model = built(run_from(folder, tmp_path / "run", model={"init_from": str(folder), "dtype": "float32", **tuned}))
    batch = data.processor([talk(picture(tmp_path, 97, 61), picture(tmp_path, 44, 20))], answers=True)
    media, tower = batch.media["image"], model.encoder("vision")
    assert isinstance(tower, NativeTower)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        tower(media.values, None, media.patches)
    counts = counter.get_flop_counts()["Global"]
    assert native_forward(tower, media) == sum(counts.values())
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    assert attention > 0
    with FlopCounterMode(display=False) as counter:
        model.get_submodule("vision_projector")(tower(media.values, None, media.patches)).sum().backward()
    found = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    embedding = next(m.weight for m in tower.modules() if isinstance(m, PatchLinear))
    pixels = 2 * embedding.numel() * len(media.values) if learns else 0
    assert found == sum(media_flops(model, batch)) - (3 if learns else 1) * attention - pixels
