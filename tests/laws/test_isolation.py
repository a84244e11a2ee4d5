"""Packed samples do not see each other: every class passes the proof in every dtype, and no leak, however small, does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.llm import attention
from model.llm.attention import causal_attention
from model.multimodal import MultimodalLM
from tests.support.router import MIXTURES, save_mixture
from tests.support.tiny import FAMILIES, save_llm
from tests.support.trainable import ALONE
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import replicate
from trainer.isolation import prove_isolation

DTYPES = ("float32", "bfloat16")
KINDS = (*FAMILIES, *MIXTURES)
CROWD = ("mixtral", "qwen2")
"""Those that leaks are put into."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("isolation")
    for kind in KINDS:
        (save_mixture if kind in MIXTURES else save_llm)(root / kind, kind)
    return root


def build(folder: Path, dtype: str, tune: Any = "full") -> Any:
    config = ModelConfig(LlmConfig(str(folder), tune), dtype=dtype)  # type: ignore[arg-type]
    model = build_model(config, LoraConfig(rank=2, dropout=0.5)).train()
    replicate(model, ALONE)  # casts for compute
    return model


def is_refused(model: MultimodalLM) -> bool:
    try:
        prove_isolation(model, 0, ALONE)
    except ConfigError as error:
        return "see each other; set data.packing = false" in str(error)
    return False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_passes(folders: Path, kind: str, dtype: str) -> None:
    model = build(folders / kind, dtype)
    prove_isolation(model, 0, ALONE)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_it_is_so_whatever_learns_and_with_recomputation(folders: Path, tune: str) -> None:
    model = build(folders / "mixtral", "bfloat16", tune)
    checkpoint_activations(model)
    prove_isolation(model, 0, ALONE)


def test_other_rows_may_round_otherwise_in_a_mixture(folders: Path) -> None:
    """As products of other numbers of rows do on some machines (4.8e-7 in float32), which is what demanding equal bits refused."""
    model = build(folders / "mixtral", "float32")
    for layer in model.llm.model.layers:

        def rounding(rows: Tensor, chosen: Tensor, weights: Tensor, plain: Any = layer.mlp.experts.forward) -> Any:
            return plain(rows, chosen, weights) * (1 + 1e-6 * rows[0, 0].sign().item())

        layer.mlp.experts.forward = rounding
    prove_isolation(model, 0, ALONE)


Leak = Callable[[Tensor], Tensor]
LEAKS: dict[str, Leak] = {
    "a convolution": lambda out: out + 1e-2 * F.pad(out, (0, 0, 0, 0, 1, 0))[:, :-1],
    "one from behind": lambda out: out + 1e-2 * F.pad(out, (0, 0, 0, 0, 0, 1))[:, 1:],
    "a mean over all": lambda out: out + 1e-2 * out.mean(1, keepdim=True),
    "the first token alone": lambda out: out + 1e-3 * out[:, :1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("kind", CROWD)
def test_an_attention_that_leaks_is_found(folders: Path, monkeypatch: pytest.MonkeyPatch, kind: str, leak: str, dtype: str) -> None:
    model = build(folders / kind, dtype)
    right = attention.packed_attention

    def leaking(*args: Any, **options: Any) -> tuple[Tensor, None]:
        return LEAKS[leak](right(*args, **options)[0]), None

    register(monkeypatch, leaking)
    assert is_refused(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CROWD)
def test_attention_over_the_whole_row_is_found(folders: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str) -> None:
    def whole(*args: Any, segment_lengths: Any, segment_borders: Any, **options: Any) -> tuple[Tensor, None]:
        return causal_attention(*args, **options)

    model = build(folders / kind, dtype)
    register(monkeypatch, whole)
    assert is_refused(model)


def register(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Let packed rows be computed by `function` in models, as transformers looks it up by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.PACKED, function)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_a_capacity_are_found_though_no_gradient_tells(folders: Path, dtype: str) -> None:
    """Of the tokens that choose one expert only the first few are computed: the second sample's are dropped for the first's."""
    model = build(folders / "mixtral", dtype)
    for layer in model.llm.model.layers:
        experts, capacity = layer.mlp.experts, 5

        def dropping(rows: Tensor, chosen: Tensor, weights: Tensor, plain: Any = experts.forward, capacity: int = capacity) -> Any:
            one_hot = F.one_hot(chosen, 4)
            places = (one_hot.flatten(0, 1).cumsum(0).view_as(one_hot) * one_hot).sum(-1)
            return plain(rows, chosen, 8 * weights * (places <= capacity))  # so that experts matter

        experts.forward = dropping
    assert is_refused(model)
