"""The last block computes its second half of the supervised rows alone: every number is that of computing all rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from data.collate import collate, collate_packed
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.build import assemble
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.last_block import _is_standard, _selective, make_last_block_selective, standard_block
from model.llm.causal_lm import VocabularyLayout, blocks
from model.loss import Term
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.ranks import run_ranks
from tests.support.tiny import FAMILIES, SIZES, save_llm
from tests.support.trainable import ALONE
from trainer.config import ParallelConfig
from trainer.distributed import compiled_blocks
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World

LAYOUTS = {"padded": collate, "packed": collate_packed}
REFUSED = {"phi3", "gemma2", "gemma3", "granite", "cohere", "cohere2"}
"""More norms, a factor or dropout in front of a sum, both halves side by side."""
LENGTHS = (9, 17, 5, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save_llm(root / family, family)
    return root


def batch_of(layout: str, first: int = 0, last: int = len(LENGTHS), step: int = 3) -> Batch:
    """Samples `first` to `last`, of which every `step`-th token is learned; 0: none."""
    samples = []
    for i, length in enumerate(LENGTHS[first:last], first):
        ids = torch.arange(length).mul(7 + i).remainder(300).numpy()
        labels = ids.copy()
        labels[[not step or k % step != 1 for k in range(length)]] = IGNORE_INDEX
        samples.append(Sample(i, 0, ids, labels, {}))
    return LAYOUTS[layout](samples, 0)


def build(
    folder: Path,
    tune: Any = "full",
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    selects: bool = True,
    world: World = ALONE,
    dtype: torch.dtype = torch.float64,
) -> MultimodalLM:
    """A model that computes supervised rows alone where its class allows, or all rows."""
    name: Any = "float32"
    config = ModelConfig(LlmConfig(str(folder), tune), dtype=name)
    card = make_card(config, LoraConfig(rank=2, dropout=0.0), VocabularyLayout())
    model = assemble(card, torch.float32)
    model.selects_rows &= selects
    prepare_blocks(model, parallel)
    if world.size > 1 and parallel.strategy == "fsdp":
        shard(model, parallel, world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=torch.float32, device=world.device)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("lora_B"):
                p.copy_(torch.ones_like(p).mul_(0.1))
    if world.size == 1:
        model.to(dtype)
        model.dtype = dtype
        replicate(model, world, parallel)
    return model.train()


def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss of a micro-batch and its gradients, by name."""
    model.zero_grad()
    loss = model(batch)["text"].sum
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
    return {"loss": loss.detach(), **{name: g.detach().clone() for name, g in whole.items()}}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest change, each relative to the largest number of the loss or of its gradient."""
    assert found.keys() == expected.keys() and len(found) > 5
    return max(float((found[n] - t).abs().max() / t.abs().max().clamp(min=1e-9)) for n, t in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_loss_and_the_gradients_of_all_rows(folders: Path, family: str) -> None:
    model, whole = build(folders / family), build(folders / family, selects=False)
    assert model.selects_rows == (family not in REFUSED)
    for layout in LAYOUTS:
        batch = batch_of(layout)
        # Norms round to float32 within a float64 model.
        assert distance(step(model, batch), step(whole, batch)) < 1e-6
        torch.testing.assert_close(model.decode(batch), whole.decode(batch), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_recomputed_blocks_and_adapters_too(folders: Path, tune: str, kind: Any) -> None:
    parallel = ParallelConfig(activation_checkpointing=kind)
    model, whole = build(folders / "llama", tune, parallel), build(folders / "llama", tune, parallel, selects=False)
    for batch in (batch_of("packed"), batch_of("padded", step=1), batch_of("padded", 1, 2)):
        assert distance(step(model, batch), step(whole, batch)) < 1e-6
        assert model.loss(batch)[0] == pytest.approx(float(whole.loss(batch)[0]), rel=1e-9)


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_supervised_row_every_gradient_is_there_and_zero(folders: Path, layout: str, kind: Any) -> None:
    for tune in ("full", "lora"):
        model = build(folders / "qwen2", tune, ParallelConfig(activation_checkpointing=kind))
        found = step(model, batch_of(layout, step=0))
        assert found.keys() == {"loss", *(name for name, p in model.named_parameters() if p.requires_grad)}
        assert not any(value.any() for value in found.values())


def test_products_of_the_other_rows_are_saved(folders: Path) -> None:
    """An MLP has three matrices (48, 32); forward, gradient of the input and of the matrix are 2 operations for each number."""
    batch, found = batch_of("packed"), []
    for selects in (True, False):
        model = build(folders / "qwen3", selects=selects, dtype=torch.float32)
        rows: list[int] = []
        last = blocks(model.llm.get_decoder())[-1]
        last.mlp.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].shape[1]))  # type: ignore[union-attr]
        with FlopCounterMode(display=False) as counter:
            step(model, batch)
        assert rows == [batch.num_supervised if selects else sum(LENGTHS)]
        found.append(counter.get_total_flops())
    assert found[1] - found[0] == 3 * 3 * 2 * 48 * 32 * (sum(LENGTHS) - batch.num_supervised)


class Reader:
    """A term that reads the state of all rows."""

    coefficient = 1.0

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def count(self, batch: Batch) -> float:
        return 1.0

    def term(self, hidden: Tensor, batch: Batch) -> Term:
        self.shapes.append(tuple(hidden.shape))
        return Term(hidden.sum(), hidden.detach().sum(-1).flatten())


def test_other_terms_get_all_rows(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, reader = build(folders / "qwen2"), batch_of("padded"), Reader()
    expected = step(model, batch)["loss"]
    monkeypatch.setattr(MultimodalLM, "other_terms", property(lambda _: {"reader": reader}))
    assert float(model(batch)["text"].sum.detach()) == pytest.approx(float(expected), rel=1e-12)
    assert reader.shapes == [(*batch.input_ids.shape, 32)]


def decoder() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES)).model


def test_a_block_that_somebody_hooks_or_that_differs_is_left_alone() -> None:
    hooked, read, other, scaled, extended = (decoder() for _ in range(5))
    blocks(hooked)[-1].register_forward_hook(lambda module, args, out: out)
    blocks(read)[-1].register_forward_pre_hook(lambda module, args: None)
    blocks(other)[-1].mlp = nn.Sequential(nn.Conv1d(2, 2, 1))
    blocks(scaled)[-1].mlp.scale = nn.Parameter(torch.ones(SIZES["hidden_size"]))  # type: ignore[union-attr]
    extended.late = nn.Identity()
    mixture = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).model
    for model in (hooked, read, other, scaled, extended, mixture, nn.Linear(2, 2)):
        kinds = [type(module) for module in model.modules()]
        assert not make_last_block_selective(model)
        assert [type(module) for module in model.modules()] == kinds
    taken = decoder()
    assert make_last_block_selective(taken)
    assert [type(block) is LlamaDecoderLayer for block in blocks(taken)] == [True, False]
    assert type(blocks(taken)[-1]).__name__ == "LlamaDecoderLayer"


def block_class(body: Callable[..., Tensor], module: str = "transformers.models") -> type[nn.Module]:
    body.__module__ = module
    return type("Block", (nn.Module,), {"forward": body})


def test_a_class_is_taken_that_computes_the_same_and_hands_attention_all_it_is_given() -> None:
    def standard(self: Any, hidden_states: Tensor, mask: Any = None, **options: Any) -> Tensor:
        return standard_block(self, hidden_states, None, mask=mask, **options)

    def without_mask(self: Any, hidden_states: Tensor, mask: Any = None, **options: Any) -> Tensor:
        return standard_block(self, hidden_states, None, **options)

    def named_alone(self: Any, hidden_states: Tensor, mask: Any = None, **options: Any) -> Tensor:
        return standard_block(self, hidden_states, None, mask=mask)

    def halved(self: Any, hidden_states: Tensor, mask: Any = None, **options: Any) -> Tensor:
        return standard(self, hidden_states, mask, **options) / 2

    assert _is_standard(block_class(standard))
    assert not any(_is_standard(block_class(body)) for body in (without_mask, named_alone, halved))
    assert not _is_standard(block_class(standard, "remote.code"))


def test_a_block_that_is_given_options_by_their_places_computes_all_rows() -> None:
    def plain(self: Any, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states * mask

    x, mask = torch.ones(2, 3, 4), torch.arange(4.0)
    assert torch.equal(_selective(plain)(nn.Module(), x, mask, supervised_rows=torch.tensor([1])), x * mask)  # type: ignore[arg-type]


def sharded_steps(world: World, folder: Path) -> list[dict[str, Tensor]]:
    """Summed loss and gradients of a step on two ranks, the second of which has first some supervised rows and then none."""
    parallel = ParallelConfig("fsdp", unit_mib=0, activation_checkpointing="full")
    model = build(folder, "lora", parallel, world=world)
    found = []
    for steps in ((3, 2), (3, 0)):
        batch = batch_of("packed", 2 * world.rank, 2 * world.rank + 2, steps[world.rank])
        one = step(model, batch)
        found.append({**one, "loss": world.sum(one["loss"])})
    return found


def sharded_steps_alone(folder: Path, steps: tuple[int, int]) -> dict[str, Tensor]:
    """The same step in one process that computes all rows, sample pair after sample pair."""
    model = build(folder, "lora", selects=False, dtype=torch.float32)
    first, second = (step(model, batch_of("packed", 2 * i, 2 * i + 2, every)) for i, every in enumerate(steps))
    return {name: value + second[name] for name, value in first.items()}


@pytest.mark.long
def test_two_ranks_that_share_weights(folders: Path) -> None:
    """A rank without a supervised row runs the same collectives; both find the gradients of all rows."""
    expected = [sharded_steps_alone(folders / "qwen2", steps) for steps in ((3, 2), (3, 0))]
    for rank in run_ranks(sharded_steps, 2, folders / "qwen2"):
        for found, wanted in zip(rank, expected, strict=True):
            assert distance(found, wanted) < 2e-6


@pytest.mark.long
@pytest.mark.parametrize("kind", ["none", "full"])
def test_compiled_blocks_hold_for_any_number_of_rows(folders: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """None, one and several rows are graphs of their own, as are one sample and several: a second pass needs no more."""
    monkeypatch.setattr(compiled_blocks, "compile_graph", compiled_blocks.partition_graph)
    torch._dynamo.reset()
    parallel = ParallelConfig(compile=True, activation_checkpointing=kind)
    model = build(folders / "llama", "lora", parallel)
    whole = build(folders / "llama", "lora", selects=False)
    compiler = vars(blocks(model.llm.get_decoder())[-1])["forward"]
    compiler = getattr(compiler, "args", [compiler])[0].compiler
    batches = [
        batch_of("packed"),
        batch_of("packed", step=0),
        batch_of("packed", 2, 3, 4),
        batch_of("packed", 1),
        batch_of("padded"),
    ]
    assert {0, 1} < {batch.num_supervised for batch in batches}
    counts = []
    for batch in batches * 2:
        assert distance(step(model, batch), step(whole, batch)) < 1e-6
        counts.append(compiler.num_graphs)
    assert counts[len(batches) - 1] == counts[-1] <= 7, counts
