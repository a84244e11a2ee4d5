"""Mixtures of experts: their files, their balancing loss, and the laws of a term that counts samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data.collate import collate, collate_packed
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.build import assemble, build_model
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.files.tensor_files import in_memory, read_weights
from model.llm.causal_lm import VocabularyLayout
from model.llm.experts import fuse_experts, fused_parameters
from model.llm.router_loss import token_owners
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.ranks import run_ranks
from tests.support.router import MIXTURES, save_mixture
from tests.support.tiny import VOCAB, save_llm
from tests.support.trainable import ALONE
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.isolation import prove_isolation
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

COEFFICIENT = 0.5
LENGTHS = (7, 19, 4, 11, 9, 13, 5)
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtures")
    for family in MIXTURES:
        save_mixture(root / family, family)
    return root


def config_of(folder: Path, router_loss: float = COEFFICIENT, tune: Any = "full") -> ModelConfig:
    return ModelConfig(LlmConfig(str(folder), tune, router_loss=router_loss), dtype="float32")


def samples(num: int = len(LENGTHS)) -> list[Sample]:
    """Every third one supervises nothing, and is balanced all the same."""
    rng, found = np.random.default_rng(4), []
    for i, length in enumerate(LENGTHS[:num]):
        ids = rng.integers(1, VOCAB, length)
        labels = np.append(ids[1:], IGNORE_INDEX) if i % 3 else np.full(length, IGNORE_INDEX)
        found.append(Sample(i, 0, ids, labels, {}))
    return found


def loss_and_gradients(model: MultimodalLM, batches: list[Batch]) -> tuple[Tensor, Gradients]:
    """Of a step of all `batches` by the contract: sums over counts, times coefficients; one backward per batch."""
    model.zero_grad()
    counts, total = model.counts(batches), torch.zeros(())
    for batch in batches:
        terms = model(batch)
        parts = [factor * terms[name].sum / (counts[name] or 1.0) for name, factor in model.coefficients().items()]
        loss = torch.stack(parts).sum()
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(folder: Path, family: str) -> Any:
    return MIXTURES[family][1].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_folder_of_experts_one_by_one_becomes_the_model_of_transformers(folders: Path, family: str) -> None:
    model, theirs = build_model(config_of(folders / family)), reference(folders / family, family)
    assert len(list((folders / family).glob("*.safetensors"))) > 1, "experts of one layer should lie in several files"
    for name, parameter in theirs.named_parameters():
        assert torch.equal(model.llm.get_parameter(name), parameter), name
    assert len(fused_parameters(model.llm)) == 4


@pytest.mark.parametrize("family", MIXTURES)
def test_rows_of_a_fused_parameter_are_those_of_its_experts(folders: Path, family: str) -> None:
    found = fuse_experts({n: rows for file in (folders / family).glob("*.safetensors") for n, rows in read_weights(file).items()})
    theirs = dict(reference(folders / family, family).named_parameters())
    for name in fused_parameters(reference(folders / family, family)):
        assert found[name].shape == tuple(theirs[name].shape)
        for start, stop in ((0, 1), (1, 3), (3, 4), (2, 2)):
            assert torch.equal(found[name].read(start, stop), theirs[name][start:stop])
    assert fuse_experts(found).keys() == found.keys(), "files of fused parameters come out as they are"


def test_a_missing_piece_of_an_expert_is_named() -> None:
    piece = in_memory(torch.zeros(2, 3))
    names = [f"llm.model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for e in (0, 2) for w in ("w1", "w2", "w3")]
    with pytest.raises(ConfigError, match=r"lack 2 tensors of experts, for example llm.model.layers.0.mlp.experts.1.w1.weight"):
        fuse_experts(dict.fromkeys(names, piece))


@pytest.mark.parametrize("family", MIXTURES)
def test_one_sample_per_forward_gives_the_loss_and_gradients_of_transformers(folders: Path, family: str) -> None:
    model, theirs = build_model(config_of(folders / family)), reference(folders / family, family)
    for sample in samples():
        found, gradients = loss_and_gradients(model, [collate([sample], 0)])
        ids, labels = (torch.from_numpy(values)[None] for values in (sample.input_ids, sample.labels))
        theirs.zero_grad()
        out = theirs(input_ids=ids, output_router_logits=True, use_cache=False)
        text = torch.nn.functional.cross_entropy(out.logits[0], labels[0], ignore_index=IGNORE_INDEX, reduction="sum")
        aux = load_balancing_loss_func(out.router_logits, 4, 2)
        expected = text / max(int((labels != IGNORE_INDEX).sum()), 1) + COEFFICIENT * aux
        expected.backward()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=0)
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(gradients[f"llm.{name}"], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_padded_packed_and_any_micro_batch_give_the_mean_over_samples(folders: Path, family: str, recompute: bool) -> None:
    model, data = build_model(config_of(folders / family)), samples()
    if recompute:
        checkpoint_activations(model)
    prove_isolation(model, 0, ALONE)
    expected = loss_and_gradients(model, [collate([sample], 0) for sample in data])
    each = [model(collate([sample], 0))["router"].sum.item() for sample in data]
    assert max(each) - min(each) > 0.01, "samples that balance alike would hide a wrong mean"
    layouts = {
        "padded": [collate(data, 0)],
        "packed": [collate_packed(data, 0)],
        "mixed": [collate_packed(data[:3], 0), collate(data[3:5], 0), collate([], 0), collate_packed([], 0), collate(data[5:], 0)],
    }
    for name, batches in layouts.items():
        rows = torch.cat([model(batch)["router"].addends for batch in batches])
        torch.testing.assert_close(rows, torch.tensor(each), rtol=1e-6, atol=0, msg=name)
        found = loss_and_gradients(model, batches)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0, msg=name)
        for parameter, gradient in expected[1].items():
            torch.testing.assert_close(found[1][parameter], gradient, rtol=1e-6, atol=1e-6, msg=f"{name}: {parameter}")


def test_owners_of_tokens_in_every_layout() -> None:
    data = samples(3)
    assert token_owners(collate(data, 0)).view(3, -1).eq(0).sum().item() == LENGTHS[0]
    right = token_owners(collate(data, 0)).view(3, -1)
    left = token_owners(collate(data, 0, "left")).view(3, -1)
    for owners, flip in ((right, False), (left, True)):
        for i, length in enumerate(LENGTHS[:3]):
            row = owners[i].flip(0) if flip else owners[i]
            assert row.tolist() == [i] * length + [3] * (len(row) - length)
    assert token_owners(collate_packed(data, 0)).tolist() == [0] * 7 + [1] * 19 + [2] * 4
    for blank in (collate([], 0), collate_packed([], 0)):
        assert token_owners(blank).tolist() == [0] and blank.lengths == ()


def test_a_blank_batch_reaches_every_parameter_with_zeros(folders: Path) -> None:
    model = build_model(config_of(folders / "mixtral"))
    for blank in (collate([], 0), collate_packed([], 0)):
        loss, gradients = loss_and_gradients(model, [*[blank], collate(samples(2), 0)])
        assert torch.equal(loss, loss_and_gradients(model, [collate(samples(2), 0)])[0])
        assert gradients.keys() == dict(model.named_parameters()).keys()
        terms = model(blank)
        model.zero_grad()
        (terms["text"].sum + terms["router"].sum).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_nothing_is_kept_outside_a_forward_of_training(folders: Path) -> None:
    model = build_model(config_of(folders / "mixtral")).eval()
    assert model.routers is not None
    model.generate(collate(samples(2), 0, "left"), 3)
    assert not any("seen_logits" in vars(router) for router in model.routers.routers)
    loss_and_gradients(model, [collate(samples(2), 0)])
    assert not any("seen_logits" in vars(router) for router in model.routers.routers)


def test_a_dense_model_has_no_routers(tmp_path: Path) -> None:
    save_llm(tmp_path, "qwen2")
    with pytest.raises(ConfigError, match=r"model.llm.router_loss = 0.5 has no effect: Qwen2Model is no mixture of experts"):
        build_model(config_of(tmp_path))


NUM_STEPS = 3


class Case(NamedTuple):
    """How a mixture is trained, on however many ranks."""

    family: str
    tune: str
    strategy: str
    recompute: bool
    layout: str
    size: int


def steps_on_ranks(world: World, folders: Path, cases: list[Case]) -> dict[Case, list[float]]:
    """What every case found; all in one process per rank: starting it takes longer than a case."""
    return {case: steps_of(world, folders / case.family, *case[1:]) for case in cases}


def steps_of(world: World, folder: Path, tune: str, strategy: str, recompute: bool, layout: str, size: int) -> list[float]:
    """Text loss, router loss and gradient norm of three steps; samples are the same for every world."""
    config = config_of(folder, tune=tune)
    card = make_card(config, LoraConfig(rank=2, dropout=0.0), VocabularyLayout())
    model = assemble(card, torch.float32)
    if recompute:
        checkpoint_activations(model)
    sharded = strategy == "fsdp" and world.size > 1
    if sharded:
        shard(model, ParallelConfig(unit_mib=0), world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=torch.float32, device=world.device)
    wrapped = model if sharded else replicate(model, world)
    model.train()
    if layout == "packed":
        prove_isolation(model, 0, world)
    optimizer = build_optimizer(model, config, OptimConfig(lr=0.1, eps=1.0))
    set_learning_rates(optimizer, 1.0)
    make = {"padded": collate, "packed": collate_packed}[layout]
    found: list[float] = []
    for step in range(NUM_STEPS):
        own = samples()[world.rank :: world.size]
        num = -(-len(samples()) // world.size)
        batches = [make(own[i : i + size], 0) for i in range(0, num, size)]
        result = train_step(wrapped, optimizer, batches, world, StepOptions(seed=0, step=step, clip_norm=1.0))
        ratio = world.sum(torch.stack([r["router_loss"] for r in result.ratios]).sum(0))
        text = world.sum(
            torch.stack([torch.cat(result.addends).sum(), torch.tensor(float(sum(b.num_supervised for b in batches)))])
        )
        assert ratio[1].item() == len(samples())
        found += [(text[0] / text[1]).item(), (ratio[0] / ratio[1]).item(), result.grad_norm.item()]
    return found


@pytest.fixture(scope="module")
def expected(folders: Path) -> dict[tuple[str, str], list[float]]:
    pairs = [("mixtral", "full"), ("mixtral", "lora"), ("qwen3_moe", "full")]
    cases = [Case(*pair, "ddp", False, "padded", len(LENGTHS)) for pair in pairs]
    return {case[:2]: found for case, found in run_ranks(steps_on_ranks, 1, folders, cases)[0].items()}


CASES = [
    (1, Case("mixtral", "full", "ddp", True, "packed", 2)),
    (2, Case("mixtral", "full", "ddp", False, "padded", 2)),
    (2, Case("mixtral", "full", "fsdp", True, "packed", 3)),
    (4, Case("mixtral", "full", "ddp", True, "packed", 1)),
    (4, Case("mixtral", "full", "fsdp", True, "padded", 1)),
    (4, Case("mixtral", "full", "fsdp", False, "padded", 2)),
    (2, Case("mixtral", "lora", "fsdp", True, "padded", 2)),
    (2, Case("mixtral", "lora", "ddp", False, "packed", 4)),
    (2, Case("qwen3_moe", "full", "fsdp", True, "packed", 2)),
]


@pytest.fixture(scope="module")
def found_by(folders: Path) -> Callable[[int], list[dict[Case, list[float]]]]:
    """What each of so many ranks found in all cases of their number."""
    return cache(lambda world: run_ranks(steps_on_ranks, world, folders, [case for ranks, case in CASES if ranks == world]))


@pytest.mark.parametrize(("world", "case"), CASES, ids=[f"{world}-{'-'.join(map(str, case))}" for world, case in CASES])
def test_same_numbers_on_any_ranks_and_layout(
    found_by: Callable[[int], list[dict[Case, list[float]]]],
    expected: dict[tuple[str, str], list[float]],
    world: int,
    case: Case,
) -> None:
    first, *others = (rank[case] for rank in found_by(world))
    assert all(rank == first for rank in others)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected[case[:2]]), rtol=1e-6, atol=1e-7)
