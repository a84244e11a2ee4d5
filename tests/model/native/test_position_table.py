"""The table of learned positions that every picture interpolates to its own size: that of torch and of transformers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from model.errors import ConfigError
from model.media_spec import NativeSpec
from model.patch_layout import patch_layout
from tests.support.published.native_runs import both_models, picture, talk

SPEC = NativeSpec(16, 8, 0, "patch", "qwen", (0.5,) * 3, (0.5,) * 3, shrink=2, multiple=2, table=12)
SIDES = range(2, 96, 2)


@pytest.mark.parametrize("table", [pytest.param(7, marks=pytest.mark.long), 12, pytest.param(48, marks=pytest.mark.long)])
def test_the_table_at_200_sizes_is_that_of_torch_and_of_transformers(table: int) -> None:
    """Patches stand in blocks of 2 x 2; every second frame of a video has the same positions."""
    random.seed(table)
    grids = [(random.choice([1, 1, 3]), random.choice(SIDES), random.choice(SIDES)) for _ in range(200)]
    rows = torch.randn(table**2, 3, generator=torch.Generator().manual_seed(0))
    found = patch_layout(grids, replace(SPEC, table=table))
    assert found.corners is not None and found.shares is not None
    mixed = (rows[found.corners] * found.shares[:, :, None]).sum(1)
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), table, align_corners=True, spatial_merge_size=2
    )
    torch.testing.assert_close(mixed, (rows[indices] * weights[:, :, None]).sum(1), rtol=0, atol=1e-5)
    square = rows.T.reshape(1, 3, table, table)
    for (times, high, wide), part in zip(grids, mixed.split([times * high * wide for times, high, wide in grids])):
        whole = F.interpolate(square, (high, wide), mode="bilinear", align_corners=True)[0]
        blocks = whole.reshape(3, high // 2, 2, wide // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, 3)
        torch.testing.assert_close(part, blocks.repeat(times, 1), rtol=0, atol=1e-4)


def test_the_table_alone_learns_where_a_tower_has_one(tmp_path: Path) -> None:
    tuned = {"llm": {"tune": "frozen"}, "vision": {"tune": "positions"}, "vision_projector": {"tune": "frozen"}}
    models = both_models("qwen3_vl", tmp_path / "qwen3", tmp_path / "run", **tuned)
    _, found = models.our_gradients(models.data.processor([talk(picture(tmp_path, 97, 61))], answers=True))
    assert list(found) == ["vision.tower.pos_embed.weight"] and found["vision.tower.pos_embed.weight"].any()
    with pytest.raises(ConfigError, match="this tower has no position embeddings"):
        both_models("qwen2_vl", tmp_path / "qwen2", tmp_path / "run2", **tuned)
