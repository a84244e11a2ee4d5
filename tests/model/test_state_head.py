"""The user's state at the end of every clip: where it is read, what its loss is, and the laws of a term that counts weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.collate import collate, collate_packed
from data.sample import Sample
from model.batch import IGNORE_INDEX
from model.build import assemble, build_model
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.llm.causal_lm import VocabularyLayout
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.ranks import run_ranks
from tests.support.router import save_mixture
from tests.support.state_head import CLASSES, FACTOR, NUM_SAMPLES, WEIGHTS, config_of, samples, spec_of
from tests.support.tiny import save_llm
from tests.support.tiny_audio import save_whisper
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.runfile.load import parse_config
from trainer.step import StepOptions, train_step


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("states")
    save_llm(root / "llm", "qwen2_tied")
    save_mixture(root / "mixture", "mixtral")
    save_whisper(root / "audio", seconds=1)
    return root


def states_of(data: list[Sample]) -> Tensor:
    return torch.tensor([clip.label for sample in data for clip in sample.media.get("audio", [])])


def logits_alone(model: MultimodalLM, data: list[Sample]) -> Tensor:
    """(M, classes): every sample by itself through transformers' own attention, the head at the last token of each clip."""
    head, found = model.get_submodule("state_head"), []
    model.llm.config._attn_implementation = "eager"  # type: ignore[union-attr]
    for sample in data:
        batch = collate([sample], 0)
        hidden = model.llm.get_decoder()(inputs_embeds=model.embed(batch), use_cache=False).last_hidden_state  # type: ignore[operator]
        for clip in sample.media.get("audio", []):
            found.append(F.linear(hidden[0, clip.start + clip.length - 1], head.weight, head.bias))
    return torch.stack(found)


def test_the_state_is_read_at_the_last_token_of_every_clip_in_every_layout(folders: Path) -> None:
    config = config_of(folders)
    data = samples(spec_of(config))
    with torch.no_grad():
        expected = logits_alone(build_model(config).eval(), data)
    assert len(expected) == NUM_SAMPLES and expected.std(0).min() > 0.01
    model = build_model(config).eval()
    for batch in (collate(data, 0), collate(data, 0, "left"), collate_packed(data, 0)):
        torch.testing.assert_close(model.user_state(batch), expected.softmax(-1), rtol=1e-5, atol=1e-6)
    assert model.user_state(collate([data[0]], 0)).shape == (0, CLASSES)
    torch.testing.assert_close(model.user_state(collate(data[:2], 0)), expected[:1].softmax(-1), rtol=1e-5, atol=1e-6)


def test_a_model_without_the_head_says_so(folders: Path) -> None:
    config = ModelConfig(LlmConfig(str(folders / "llm")), dtype="float32")
    with pytest.raises(ConfigError, match=r"without \[model.state_head\]"):
        build_model(config).user_state(collate([], 0))


@pytest.mark.parametrize("weights", [WEIGHTS, ()])
def test_the_term_is_torchs_weighted_mean_over_the_step(folders: Path, weights: tuple[float, ...]) -> None:
    config = config_of(folders, class_weights=weights)
    model = build_model(config)
    data = samples(spec_of(config))
    states = states_of(data)
    assert {*states.tolist()} == {IGNORE_INDEX, 0, 1, 2}
    logits = logits_alone(build_model(config), data)
    expected = F.cross_entropy(logits, states, weight=torch.tensor(weights) if weights else None, ignore_index=IGNORE_INDEX)
    expected.backward()
    assert model.coefficients() == {"text": 1.0, "state": FACTOR}
    layouts = {
        "one": [collate(data, 0)],
        "packed": [collate_packed(data, 0)],
        "many": [collate(data[:2], 0), collate([], 0), collate_packed(data[2:5], 0), collate_packed([], 0), collate(data[5:], 0)],
    }
    for name, batches in layouts.items():
        total, ratios = torch.zeros(()), torch.zeros(2, 2)
        count = torch.as_tensor(model.counts(batches)["state"])
        for batch in batches:
            term = model(batch)["state"]
            (term.sum / count).backward()
            total += term.sum.detach() / count
            ratios += torch.stack([term.ratios["state_loss"], term.ratios["state_accuracy"]])
        torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(ratios[0, 0] / ratios[0, 1], expected.detach(), rtol=1e-6, atol=0, msg=name)
        right = (logits.argmax(-1) == states).sum().item()
        assert ratios[1].tolist() == [right, (states != IGNORE_INDEX).sum().item()] and right > 0
    head = model.get_submodule("state_head")
    reference = F.cross_entropy(logits, states, weight=torch.tensor(weights) if weights else None, ignore_index=IGNORE_INDEX)
    inputs = torch.autograd.grad(reference, logits, retain_graph=True)[0].sum(0)
    torch.testing.assert_close(head.bias.grad, len(layouts) * inputs, rtol=1e-5, atol=1e-6)


def test_a_batch_without_clips_still_makes_gradients(folders: Path) -> None:
    model = build_model(config_of(folders))
    for blank in (collate([], 0), collate_packed([], 0), collate(samples(spec_of(config_of(folders)))[:1], 0)):
        assert model.counts([blank])["state"] == 0.0
        model(blank)["state"].sum.backward()
        for parameter in model.get_submodule("state_head").parameters():
            assert parameter.grad is not None and not parameter.grad.any()


def test_first_values_depend_on_the_seed_alone(folders: Path) -> None:
    config = config_of(folders)
    one, same, other = (build_model(config, seed=seed).get_submodule("state_head") for seed in (1, 1, 2))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert one.weight.abs().max() <= 32**-0.5 and {*one.state_dict()} == {"weight", "bias"}


NUM_STEPS = 3


class Case(NamedTuple):
    """How a model with a head is trained, on however many ranks."""

    llm: str
    tune: str
    strategy: str
    recompute: bool
    size: int


def steps_on_ranks(world: World, folder: Path, cases: list[Case]) -> dict[Case, list[float]]:
    """What every case found; all in one process per rank: starting it takes longer than a case."""
    return {case: steps_of(world, folder, *case) for case in cases}


def steps_of(world: World, folder: Path, llm: str, tune: str, strategy: str, recompute: bool, size: int) -> list[float]:
    """What every term shows and the gradient norm of three steps; samples are the same for every world."""
    config = config_of(folder, llm, tune)
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
    optimizer = build_optimizer(model, config, OptimConfig(lr=0.1, eps=1.0))
    set_learning_rates(optimizer, 1.0)
    assert any(group["name"].startswith("state_head/no_decay/") for group in optimizer.param_groups)
    found: list[float] = []
    for step in range(NUM_STEPS):
        own = samples(spec_of(config))[world.rank :: world.size]
        make = (collate, collate_packed)[step % 2]
        batches = [make(own[i : i + size], 0) for i in range(0, -(-NUM_SAMPLES // world.size), size)]
        result = train_step(wrapped, optimizer, batches, world, StepOptions(seed=0, step=step, clip_norm=1.0))
        names = list(result.ratios[0])
        ratios = world.sum(torch.stack([torch.stack([r[name] for name in names]) for r in result.ratios]).sum(0))
        text = world.sum(torch.cat(result.addends).sum())
        found += [text.item(), *(ratios[:, 0] / ratios[:, 1]).tolist(), result.grad_norm.item()]
    return found


@pytest.fixture(scope="module")
def expected(folders: Path) -> dict[tuple[str, str], list[float]]:
    pairs = (("llm", "frozen"), ("llm", "full"), ("mixture", "full"))
    cases = [Case(*pair, "ddp", False, NUM_SAMPLES) for pair in pairs]
    return {case[:2]: found for case, found in run_ranks(steps_on_ranks, 1, folders, cases)[0].items()}


CASES = [
    (2, Case("llm", "frozen", "fsdp", False, 2)),
    (1, Case("llm", "full", "ddp", True, 2)),
    (2, Case("llm", "full", "ddp", False, 1)),
    (4, Case("llm", "full", "fsdp", True, 1)),
    (2, Case("mixture", "full", "fsdp", True, 3)),
    (4, Case("mixture", "full", "ddp", False, 2)),
]


@pytest.fixture(scope="module")
def found_by(folders: Path) -> Callable[[int], list[dict[Case, list[float]]]]:
    """What each of so many ranks found in all cases of their number."""
    return cache(lambda world: run_ranks(steps_on_ranks, world, folders, [case for ranks, case in CASES if ranks == world]))


@pytest.mark.parametrize(("world", "case"), CASES, ids=[f"{world}-{'-'.join(map(str, case))}" for world, case in CASES])
def test_same_numbers_on_any_ranks(
    found_by: Callable[[int], list[dict[Case, list[float]]]],
    expected: dict[tuple[str, str], list[float]],
    world: int,
    case: Case,
) -> None:
    first, *others = (rank[case] for rank in found_by(world))
    assert all(rank == first for rank in others)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected[case[:2]]), rtol=1e-6, atol=1e-6)


AUDIO = {"audio": {"path": "a"}, "audio_projector": {}}


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"state_head": {"classes": 2}}, "[model.state_head] has no effect without [model.audio]"),
        ({**AUDIO, "state_head": {}}, "model.state_head.classes = 0 is nothing to choose from: give at least 2"),
        ({**AUDIO, "state_head": {"classes": 1}}, "model.state_head.classes = 1 is nothing"),
        (
            {**AUDIO, "state_head": {"classes": 3, "class_weights": [1.0, 5.0]}},
            "model.state_head.class_weights = [1.0, 5.0] are not one for each of 3 classes",
        ),
        ({**AUDIO, "state_head": {"classes": 2, "class_weights": [1.0, 0.0]}}, "class_weights = [1.0, 0.0] are not all positive"),
        ({**AUDIO, "state_head": {"classes": 2, "loss_weight": 0.0}}, "model.state_head.loss_weight = 0.0 is not positive"),
        ({**AUDIO, "state_head": {"classes": 2, "tune": "frozen"}}, "model.state_head.tune = 'frozen' without weights"),
        ({"llm": {"path": "x", "router_loss": -0.1}}, "model.llm.router_loss = -0.1 is negative or not finite"),
    ],
)
def test_settings_that_make_no_sense_are_named(model: dict[str, Any], problem: str) -> None:
    tables = {"output_dir": "out", "model": {"llm": {"path": "x"}, **model}, "data": {"sources": [{"path": "a.json"}]}}
    with pytest.raises(ConfigError) as error:
        parse_config(tables, "run.toml")
    assert problem in str(error.value)
