"""Selective recomputation: equal numbers in every class, no product of a weight twice, and the cheap rest not kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.multimodal import MultimodalLM
from tests.support.router import save_mixture
from tests.support.tiny import FAMILIES, save_llm
from tests.support.trainable import ALONE
from tools.bench_layer import measure, our_layer, recomputed, selected
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import replicate

IDS = torch.arange(5, 45).reshape(2, 20)
QUICK = ("qwen2", "mixtral")
PRODUCTS = {"mm", "addmm", "_grouped_mm"}


def build(folder: Path, tune: Any, kind: str, dtype: Any = "float32") -> MultimodalLM:
    model = build_model(ModelConfig(LlmConfig(str(folder), tune), dtype=dtype), LoraConfig(rank=2, dropout=0.5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    if kind != "none":
        checkpoint_activations(model, kind)
    replicate(model, ALONE)
    return model


def gradients(model: MultimodalLM) -> tuple[dict[str, Tensor], int]:
    """Gradients of a loss, and the FLOPs of matrix products that they took."""
    torch.manual_seed(2)
    with FlopCounterMode(display=False) as counter:
        hidden = model.llm.get_decoder()(input_ids=IDS).last_hidden_state
        hidden.float().sin().sum().backward()
    flops = counter.get_flop_counts()["Global"]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, sum(count for operator, count in flops.items() if str(operator).partition(".")[2] in PRODUCTS)


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.long) for k in (*FAMILIES, "mixtral")])
def test_gradients_are_equal_to_the_bit(tmp_path: Path, kind: str, tune: Any) -> None:
    (save_mixture if kind == "mixtral" else save_llm)(tmp_path, kind)
    kept, whole = gradients(build(tmp_path, tune, "none"))
    found, flops = gradients(build(tmp_path, tune, "selective"))
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
    assert flops <= whole


def test_a_product_that_is_written_to_is_an_error_and_not_a_wrong_number() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).mul_(2.0).sin()

    block = selected(Block())
    with pytest.raises(RuntimeError, match="mutated"):
        block(torch.ones(3, 4)).sum().backward()


def test_targets_for_a_layer_of_a_7b_model_hold() -> None:
    """FLOPs of products over those without recomputation; kept bytes over those now, and over those before masks were shared."""
    kept, selective, full = (
        measure(our_layer(64, 0.05), 2048),
        *(measure(again(our_layer(64, 0.05)), 2048) for again in (selected, recomputed)),
    )
    flops = [cost.forward.flops + cost.backward.flops for cost in (kept, selective, full)]
    assert flops[1] <= 1.05 * flops[0] < 1.4 * flops[0] < flops[2]
    assert selective.kept <= 0.5 * kept.kept and selective.kept / 2048 <= 0.4 * 286_712
