"""Groups, the clipped and skippable update, and schedules, against torch and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_scheduler, get_wsd_schedule

from model.build import build_model
from model.config import LlmConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.errors import ConfigError
from tests.support.tiny import save_llm, save_tower
from trainer.config import OptimConfig
from trainer.optim import build_optimizer, clipped_update, gradient_norm, set_learning_rates
from trainer.schedule import check_schedule, multiplier


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_groups_are_part_times_decay_with_their_own_rates(tmp_path: Path, decay: float) -> None:
    save_llm(tmp_path / "llm")
    save_tower(tmp_path / "vision")
    config = ModelConfig(
        LlmConfig(str(tmp_path / "llm"), "full"),
        VisionConfig(str(tmp_path / "vision"), "full", lr=3e-6),
        VisionProjectorConfig(),
        dtype="float32",
    )
    model = build_model(config)
    optimizer = build_optimizer(model, config, OptimConfig(lr=2e-5, projector_lr=1e-3, weight_decay=decay))
    set_learning_rates(optimizer, 0.5)
    rates = {group["name"].partition("/")[0]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"llm": 1e-5, "vision": 1.5e-6, "vision_projector": 5e-4}
    names = {p: name for name, p in model.named_parameters()}
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == ({name for p, name in names.items() if p.dim() > 1} if decay else set())


def make(seed: int) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), (2, 2, 2))]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 3
    return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=True)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_clipping_equals_the_library_s(clip_norm: float) -> None:
    (ours, optimizer), (theirs, reference) = make(1), make(1)
    norm = gradient_norm(ours)[0]
    expected = torch.nn.utils.clip_grad_norm_(theirs, clip_norm or 1e30)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert clipped_update(optimizer, norm, clip_norm).item() == 0
    reference.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert a.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_step_changes_nothing_and_the_next_one_goes_on(bad: float) -> None:
    (ours, optimizer), (theirs, reference) = make(2), make(2)
    clipped_update(optimizer, gradient_norm(ours)[0], 1.0)
    clipped_update(reference, gradient_norm(theirs)[0], 1.0)
    before = [p.detach().clone() for p in ours]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in ours]
    for p in ours:
        p.grad = torch.ones_like(p)
    ours[1].grad[3] = bad  # type: ignore[index]
    assert clipped_update(optimizer, gradient_norm(ours)[0], 1.0).item() == 1
    for p, value, state in zip(ours, before, moments):
        assert torch.equal(p, value)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)
    for parameters, stepping in ((ours, optimizer), (theirs, reference)):
        for p in parameters:
            p.grad = torch.full_like(p, 0.3)
        clipped_update(stepping, gradient_norm(parameters)[0], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize(("ours", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (1, 1)])
def test_schedules_equal_transformers_at_every_step(ours: str, theirs: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    config = OptimConfig(schedule=ours, warmup_steps=warmup)  # type: ignore[arg-type]
    for step in range(total):
        assert multiplier(config, step, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "decay", "total"), [(0, 10, 10), (3, 4, 12), (0, 0, 5), (2, 8, 10)])
def test_wsd_equals_transformers_at_every_step(shape: str, warmup: int, decay: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_wsd_schedule(optimizer, warmup, decay, num_training_steps=total, decay_type=shape)
    config = OptimConfig(schedule="wsd", warmup_steps=warmup, decay_steps=decay, decay_shape=shape)  # type: ignore[arg-type]
    for step in range(total):
        assert multiplier(config, step, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_wsd_is_the_same_before_its_decay_however_long_the_run() -> None:
    """So a run can be stopped in its stable phase and given more steps."""
    config = OptimConfig(schedule="wsd", warmup_steps=2, decay_ratio=0.25)
    assert [multiplier(config, step, 20) for step in range(20)] == [
        0,
        0.5,
        *[1.0] * 14,
        0.8,
        0.6,
        pytest.approx(0.4),
        pytest.approx(0.2),
    ]
    assert [multiplier(config, step, 40) for step in range(15)] == [multiplier(config, step, 20) for step in range(15)]
    with pytest.raises(ConfigError, match=r"2 steps of warm-up and 1 of decay does not fit into 2 steps: lower optim.warmup_steps"):
        check_schedule(config, 2)
