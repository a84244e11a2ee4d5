"""Places of patches on their way from a data worker to a device: nothing of them is lost, left behind or changed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch_transport import pack_for_transport
from model.batch import Batch, Media
from model.media_spec import NativeSpec
from model.patch_layout import patch_layout

COMMON: dict[str, Any] = {"select": "patch", "num_prefix": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
SPECS = {
    "windows": NativeSpec(16, 8, resize="qwen", shrink=2, multiple=2, window=32, **COMMON),
    "table": NativeSpec(16, 8, resize="qwen", shrink=2, multiple=2, table=12, **COMMON),
    "smooth table": NativeSpec(8, 8, resize="naflex", table=5, antialias=True, **COMMON),
    "angles": NativeSpec(8, 8, resize="pixtral", **COMMON),
}
GRIDS = [(1, 4, 6), (3, 2, 2), (1, 8, 2)]


def media_of(spec: NativeSpec) -> Media:
    patches = patch_layout(GRIDS, spec)
    values = torch.randn(sum(patches.lengths), 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(len(values) // spec.shrink**2)
    return Media(values, rows=tokens, slots=tokens + 5, patches=patches)


def leaves(value: object) -> Iterator[tuple[str, object]]:
    """Every field of a dataclass and of those inside it."""
    if not is_dataclass(value):
        yield "", value
        return
    for f in fields(value):
        yield from ((f"{f.name}.{name}", leaf) for name, leaf in leaves(getattr(value, f.name)))


def same(found: object, expected: object) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("kind", SPECS)
def test_patches_arrive_as_they_were_sent(kind: str) -> None:
    media = media_of(SPECS[kind])
    arrived = pickle.loads(ForkingPickler.dumps(pack_for_transport({"image": media})))["image"]
    found, expected = dict(leaves(arrived)), dict(leaves(media))
    assert found.keys() == expected.keys()
    assert [name for name, leaf in expected.items() if not same(found[name], leaf)] == []


@pytest.mark.parametrize("kind", SPECS)
def test_every_tensor_of_them_is_pinned_and_moved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths stay numbers on the CPU: no device is waited for."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    media, ids = media_of(SPECS[kind]), torch.zeros(1, 4, dtype=torch.long)
    batch = Batch(ids, ids, None, ids, ids[0], ids[0], ids[0], ids[0], (4,), media={"image": media})
    for moved in (batch.pin_memory().media["image"], batch.to(torch.device("meta")).media["image"]):
        for (name, leaf), (_, before) in zip(leaves(moved), leaves(media), strict=True):
            if isinstance(before, Tensor):
                assert isinstance(leaf, Tensor) and leaf.is_meta and leaf.shape == before.shape, name
            else:
                assert leaf == before, name
