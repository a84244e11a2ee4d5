"""Towers of variable size are those of transformers: every picture alone or packed, hidden states, gradients and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.config import DataConfig
from data.media.image_decode import Picture
from data.media.native_image import patches_of, resized
from data.media.native_size import fitted_size
from data.media.pixel_budget import rule_of
from model.build import build_model
from model.config import LlmConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.media_spec import MediaMeta, NativeSpec, num_tokens
from model.patch_layout import Grid, patch_layout
from model.vision import segment_attention
from model.vision.naflex_tower import resized_table
from model.vision.native_tower import NativeTower
from model.vision.segment_operator import attend_in_graph
from model.vision.tower import vision_spec
from tests.support.published.native_towers import NATIVE_TOWER_MAKERS, narrow_tables_resized, noise, save_native_tower
from tests.support.tiny import save_llm

ODD_SIZES = (
    *((28, 1500), (1333, 777), (1, 54), (56, 56), (10, 10), (97, 61)),
    *((1500, 28), (33, 200), (640, 480), (7, 9), (101, 100), (300, 3)),
)
TOGETHER = pytest.mark.parametrize("name", NATIVE_TOWER_MAKERS)


def built(folder: Path, **settings: Any) -> tuple[NativeTower, NativeSpec]:
    """Our tower of a folder with its weights, and its spec."""
    llm = folder.parent / "llm"
    if not llm.exists():
        save_llm(llm)
    vision = VisionConfig(str(folder), "full", **{"layer": -1, **settings})
    config = ModelConfig(LlmConfig(str(llm), tune="frozen"), vision, VisionProjectorConfig(), dtype="float32")
    model = build_model(config)
    tower, spec = model.encoder("vision"), model.specs["image"]
    assert isinstance(tower, NativeTower) and isinstance(spec, NativeSpec)
    return tower.eval(), spec


def prepared(pictures: list[Image.Image], spec: NativeSpec) -> tuple[list[Tensor], list[Grid]]:
    """Patches (P, 3, 1, p, p) and grid of each picture."""
    config, values, grids = DataConfig(image_fit="native"), [], []
    for picture in pictures:
        width, height = fitted_size(picture.size, rule_of(spec, config))
        values.append(patches_of([resized(Picture.of(picture), (width, height), spec)], spec, config))
        grids.append((1, height // spec.patch, width // spec.patch))
    return values, grids


def encoded(tower: NativeTower, values: list[Tensor], grids: list[Grid], spec: NativeSpec) -> Tensor:
    found = tower(torch.cat(values), None, patch_layout(grids, spec))
    return found[0]


@TOGETHER
@pytest.mark.parametrize("layer", [-1, -2])
def test_hidden_states_and_gradients_are_those_of_transformers(tmp_path: Path, name: str, layer: int) -> None:
    maker, theirs = NATIVE_TOWER_MAKERS[name], save_native_tower(tmp_path / name, name)
    tower, spec = built(tmp_path / name, layer=layer)
    pictures = [noise(*size) for size in ODD_SIZES]
    values, grids = prepared(pictures, spec)
    found = encoded(tower, values, grids, spec)
    expected = [maker.states(theirs, maker.pixels(picture, return_tensors="pt"))[layer] for picture in pictures]
    assert [len(state) for state in expected] == [num_tokens(spec, MediaMeta(patches=grid)) for grid in grids]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    weights = torch.randn_like(found) / len(found) ** 0.5
    (found * weights).sum().backward()
    (torch.cat(expected) * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    for path, parameter in tower.tower.named_parameters():
        wanted = gradients[path].grad
        assert parameter.grad is not None and wanted is not None, path
        size = max(float(wanted.abs().max()), 0.1)  # that of a bias of keys is 0 but for rounding
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-5 * size, msg=path)


@TOGETHER
def test_packed_pictures_are_as_alone_and_nothing_is_padded(tmp_path: Path, name: str) -> None:
    save_native_tower(tmp_path / name, name)
    tower, spec = built(tmp_path / name)
    values, grids = prepared([noise(*size) for size in ODD_SIZES], spec)
    computed, viewed = [], []
    block = next(module for module in tower.tower.modules() if isinstance(module, nn.ModuleList))[0]
    block.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2]))
    tower.tower.register_forward_hook(lambda _, args, states: viewed.append(states._base))
    packed = encoded(tower, values, grids, spec)
    assert computed == [(1, sum(high * wide for _, high, wide in grids))] and viewed == [None]
    alone = [encoded(tower, [rows], [grid], spec) for rows, grid in zip(values, grids)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-6, atol=2e-6)


def test_every_size_resizes_the_table_as_torch_does(tmp_path: Path) -> None:
    """Also where the table is larger than the picture, along one side or both, and the average is over many of its rows."""
    theirs = save_native_tower(tmp_path / "naflex", "naflex", num_patches=256)
    spec = vision_spec(VisionConfig(str(tmp_path / "naflex")))
    assert isinstance(spec, NativeSpec) and spec.table == 16
    table = theirs.embeddings.position_embedding.weight.detach()
    for high, wide in ((1, 1), (1, 49), (3, 16), (16, 16), (7, 5), (40, 2), (17, 31)):
        found = resized_table(table, patch_layout([(1, high, wide)], spec))
        square, shape = table.reshape(16, 16, -1), torch.tensor([[high, wide]])
        with narrow_tables_resized():
            expected = theirs.embeddings.resize_positional_embeddings(square, shape, max_length=high * wide)[0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def segments_of(*lengths: int) -> segment_attention.Segments:
    return segment_attention.segments_of(lengths, torch.tensor([0, *lengths]).cumsum(0).int())


def test_segments_that_do_not_add_up_are_refused() -> None:
    rows = torch.zeros(1, 2, 6, 4)
    for lengths in ((4,), (4, 4)):
        with pytest.raises(ValueError, match="do not describe"):
            segment_attention.segment_attention(nn.Identity(), rows, rows, rows, segments_of(*lengths))
        with pytest.raises(ValueError, match="do not describe"):
            attend_in_graph(rows, rows, rows, torch.tensor(lengths), None)
    with pytest.raises(ValueError, match="no segments"):
        segment_attention.segment_attention(nn.Identity(), rows, rows, rows, None)


def test_the_operator_of_compiled_blocks_attends_as_eager_ones_do() -> None:
    lengths = (3, 3, 1, 7, 2)
    inputs = [torch.randn(1, 2, sum(lengths), 4, requires_grad=True) for _ in range(3)]
    eager, _ = segment_attention.segment_attention(nn.Identity(), *inputs, segments_of(*lengths), scaling=0.3)
    in_graph = attend_in_graph(*inputs, torch.tensor(lengths), 0.3)
    assert torch.equal(in_graph, eager)
    weights = torch.randn_like(eager)
    expected, found = (torch.autograd.grad(result, inputs, weights, retain_graph=True) for result in (eager, in_graph))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))
    operator = torch.ops.multimodal_patches.segments.default
    torch.library.opcheck(
        operator, ([t.detach() for t in inputs] + [torch.tensor(lengths), 0.3]), test_utils=("test_schema", "test_faketensor")
    )
