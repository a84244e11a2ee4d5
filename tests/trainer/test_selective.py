"""Selective recomputation: equal numbers in every class, hardly a product of a weight twice, and the cheap rest not kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.multimodal import MultimodalLM
from tests.support.router import save_mixture
from tests.support.tiny import FAMILIES, save_llm
from tests.support.trainable import ALONE
from tools import bench_layer
from tools.bench_layer import CostCounter, measure, our_layer, recomputed, selected
from trainer.distributed import selective
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import replicate
from trainer.distributed.selective import State, recompute_selectively

IDS = torch.arange(5, 45).reshape(2, 20)
QUICK = ("qwen2", "mixtral")


def build(folder: Path, tune: Any, kind: str, dtype: Any = "float32") -> MultimodalLM:
    """A model whose embeddings have a gradient, as where pictures are spliced in."""
    model = build_model(ModelConfig(LlmConfig(str(folder), tune), dtype=dtype), LoraConfig(rank=2, dropout=0.5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.llm.get_input_embeddings().register_forward_hook(lambda module, inputs, rows: rows.requires_grad_())
    if kind != "none":
        checkpoint_activations(model, kind)
    replicate(model, ALONE)
    return model


def gradients(model: MultimodalLM) -> tuple[dict[str, Tensor], float]:
    """Gradients of a loss, and the FLOPs of matrix products that they took."""
    torch.manual_seed(2)
    with CostCounter() as counter:
        hidden = model.llm.get_decoder()(input_ids=IDS).last_hidden_state
        hidden.float().sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, counter.cost.flops


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.long) for k in (*FAMILIES, "mixtral")])
def test_gradients_are_equal_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tune: Any) -> None:
    """Whatever share of the products backward may compute again: none, the usual one, or all of them."""
    (save_mixture if kind == "mixtral" else save_llm)(tmp_path, kind)
    monkeypatch.setattr(bench_layer, "PRODUCTS", {"addmm_", *selective.PRODUCTS})  # scores that are capped: always again
    kept, whole = gradients(build(tmp_path, tune, "none"))
    taken = []
    for share in (0.0, selective.FLOPS_AGAIN, 0.5):
        monkeypatch.setattr(selective, "FLOPS_AGAIN", share)
        found, flops = gradients(build(tmp_path, tune, "selective"))
        assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
        taken.append(flops / whole)
    assert taken[0] <= 1 and taken[1] <= 1.05 and 1.1 < taken[2] <= 1.5


class Sum(nn.Module):
    """A block of two products: of x in the middle, and of its sine at the end. `how`: what stands between that one and the sum."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.inner, self.outer = how, nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.how(self.outer(self.inner(x).sin()))


@pytest.mark.parametrize(
    ("how", "passes"),
    [
        (torch.clone, 2),
        (torch.sin, 2),
        (lambda x: x, 1),
        (lambda x: x.view(3, 2, 2).view(3, 4), 1),
        (lambda x: x.double().float(), 1),
    ],
)
def test_only_what_backward_reads_is_kept(monkeypatch: pytest.MonkeyPatch, how: Callable[[Tensor], Tensor], passes: int) -> None:
    monkeypatch.setattr(selective, "FLOPS_AGAIN", 0.0)
    block, x, results = Sum(how), torch.randn(3, 4), list[selective.Result]()
    right = torch.autograd.grad(block(x).cos().sum(), [*block.parameters()])
    modes = selective.Recording(results, selective.Allowance()), selective.Replaying(results)
    out = checkpoint(block, x, use_reentrant=False, context_fn=lambda: modes)
    assert [result.state for result in results] == [State.KEPT] * passes + [State.UNREAD] * (2 - passes)
    assert all(map(torch.equal, torch.autograd.grad(out.cos().sum(), [*block.parameters()]), right))


def test_a_result_that_a_foreign_node_saves_unseen_is_no_number_rather_than_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            found = x @ x
            ctx.save_for_backward(found)
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * ctx.saved_tensors[0]

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Saving.apply(x)
            return x + found

    x = torch.ones(3, 3, requires_grad=True)
    block = Block()
    recompute_selectively([block])
    block(x).sum().backward()
    assert x.grad is not None and x.grad.isnan().all()


def test_a_product_that_is_written_to_is_an_error_and_not_a_wrong_number() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).mul_(2.0).sin()

    block = Block()
    recompute_selectively([block])
    with pytest.raises(RuntimeError, match="mutated"):
        block(torch.ones(3, 4)).sum().backward()


def test_a_second_backward_and_a_block_that_changes_are_told() -> None:
    class Block(nn.Module):
        changed = False

        def forward(self, x: Tensor) -> Tensor:
            return (torch.addmm(x, x, x) if self.changed else x @ x).sin()

    block = Block()
    recompute_selectively([block])
    total = block(torch.ones(3, 3, requires_grad=True)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward runs a second time through a selectively recomputed block: aten\.mm"):
        total.backward()
    total, block.changed = block(torch.ones(3, 3, requires_grad=True)).sum(), True
    with pytest.raises(RuntimeError, match=r"recomputation ran aten\.addmm\.default where forward ran aten\.mm\.default"):
        total.backward()


def test_targets_for_a_layer_of_a_7b_model_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of products over those without recomputation; kept bytes over those now."""
    kept = measure([our_layer(64, 0.05)], 2048)
    full = measure([recomputed(our_layer(64, 0.05))], 2048)
    some = measure(selected([our_layer(64, 0.05) for _ in range(8)]), 2048)
    monkeypatch.setattr(selective, "FLOPS_AGAIN", 0.0)
    none = measure(selected([our_layer(64, 0.05)]), 2048)
    flops = [cost.forward.flops + cost.backward.flops for cost in (kept, none, some, full)]
    assert flops[0] == flops[1] < flops[2] <= 1.05 * flops[0] < 1.4 * flops[0] < flops[3]
    assert some.kept <= 0.4 * kept.kept < none.kept <= 0.45 * kept.kept
    # Of a token: queries, keys and values; what attention returns, and its sums; the product behind it; both inner ones; adapters.
    assert none.kept / 2048 == 2 * (3584 + 2 * 512) + 2 * 3584 + 4 * 28 + 2 * 3584 + 2 * 2 * 18944 + 7 * 2 * 64
