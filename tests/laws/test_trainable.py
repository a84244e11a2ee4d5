"""Law 4: exactly what `tune` promises learns, frozen parts stay in eval mode, and what the loss cannot reach is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.errors import ConfigError
from model.media_spec import MediaMeta, num_tokens
from model.trainable import part_table
from tests.support.equivalence import make_sample, step_batches
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from tests.support.trainable import ALONE, build
from trainer.config import OptimConfig
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.setup import prove_gradients
from trainer.step import StepOptions, train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    save_llm(folder / "llm", "qwen2")
    save_tower(folder / "vision", "clip")
    return folder


def promised(name: str, tunes: dict[str, str], bias: str, adapted: set[str]) -> bool:
    part = name.partition(".")[0]
    if tunes[part] != "lora":
        return tunes[part] == "full"
    owner, _, kind = name.rpartition(".")
    return kind in ("lora_A", "lora_B") or (kind == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted)))


CASES = [
    (llm, vision, projector, bias)
    for llm, vision, projector in product(("frozen", "lora", "full"), ("frozen", "lora", "full"), ("frozen", "full"))
    for bias in (("none", "all", "lora_only") if "lora" in (llm, vision) else ("none",))
    if {llm, vision, projector} != {"frozen"}
]


@pytest.mark.parametrize(("llm", "vision", "projector", "bias"), CASES)
def test_exactly_the_promised_tensors_change(folder: Path, llm: str, vision: str, projector: str, bias: str) -> None:
    tunes = {"llm": llm, "vision": vision, "vision_projector": projector}
    targets = ("llm.*.q_proj", "vision.*.fc1") if {llm, vision} == {"lora"} else ("*.q_proj",)
    model, config = build(folder, llm, vision, projector, bias=bias, targets=targets)
    adapted = {name for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {n for n in adapted if n.endswith(("q_proj", "fc1"))} and bool(adapted) == ("lora" in (llm, vision))
    before = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    learning = model.trainable_parts
    optim = OptimConfig(lr=0.1, eps=1e-8)
    optimizer = build_optimizer(model, config, optim)
    set_learning_rates(optimizer, 1.0)
    width = num_tokens(model.specs["image"], MediaMeta())
    for step in range(2):  # twice: B is zero at first, so A gets its first gradient in the second step
        train_step(
            replicate(model, ALONE),
            optimizer,
            step_batches(step, ALONE, 4, width),
            ALONE,
            StepOptions(seed=0, step=step, clip_norm=0.0),
        )
    after = dict([*model.named_parameters(), *model.named_buffers()])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    # The bias of a key cancels in the softmax, so its gradient is rounding or nothing.
    expected = {name for name, _ in model.named_parameters() if promised(name, tunes, bias, adapted)}
    assert changed | {n for n in expected if n.endswith("k_proj.bias")} == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert learning >= {name.partition(".")[0] for name in changed}


def test_frozen_parts_stay_in_eval_mode_through_every_train(folder: Path) -> None:
    model, _ = build(folder, "lora", "frozen", "full")
    for mode in (True, False, True):
        model.train(mode)
        assert all(not m.training for m in model.get_submodule("vision").modules())
        assert model.llm.training is mode and model.get_submodule("vision_projector").training is mode


def test_the_table_counts_every_parameter_once(folder: Path) -> None:
    model, config = build(folder, "lora", "frozen", "full")
    rows = {row.part: row for row in part_table(model, config)}
    assert sum(row.num_parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert rows["vision"].num_trainable == 0
    assert rows["vision_projector"].num_trainable == rows["vision_projector"].num_parameters
    adapters = [p.numel() for n, p in model.named_parameters() if "lora_" in n]
    assert rows["llm"].num_trainable == sum(adapters)


class Stray(nn.Linear):
    """A layer with a parameter that its forward never uses."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.stray = nn.Parameter(torch.ones(3))


def prove_with_stray(world: World, folder: Path, strategy: str, planted: bool) -> str:
    model, _ = build(folder, "frozen", "frozen", "full")
    if planted:
        projector = model.get_submodule("vision_projector")
        projector[0] = Stray(projector[0])  # type: ignore[index, operator]
    if strategy == "fsdp":
        from trainer.config import ParallelConfig

        shard(model, ParallelConfig(unit_mib=0), world)
        wrapped: nn.Module = model
    else:
        wrapped = replicate(model, world)
    try:
        prove_gradients(wrapped, model, 0, world)
    except ConfigError as error:
        return str(error)
    assert all(p.grad is None for p in model.parameters())
    return ""


@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_a_parameter_the_loss_cannot_reach_stops_the_run_before_step_one(folder: Path, size: int, strategy: str) -> None:
    for text in run_ranks(prove_with_stray, size, folder, strategy, True):
        assert "vision_projector.0.stray" in text and "cannot be reached by the loss" in text
    assert run_ranks(prove_with_stray, size, folder, strategy, False) == [""] * size


def test_make_sample_covers_every_kind() -> None:
    """The batches these laws are tested with: text only, one picture, two, and nothing supervised."""
    samples = [make_sample(i, 4, np.random.default_rng(0)) for i in range(10)]
    assert {len(s.media.get("image", [])) for s in samples} == {0, 1, 2}
    assert {bool((s.labels >= 0).any()) for s in samples} == {True, False}
