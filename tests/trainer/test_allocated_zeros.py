"""Gradients and the optimizer's state exist before the first forward of a step of several micro-batches, and change no number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainer.step as steps
from model.build import build_model
from model.config import LlmConfig, ModelConfig
from tests.support.llm import batch
from tests.support.tiny import save_llm
from tests.support.trainable import ALONE
from trainer.config import OptimConfig
from trainer.optim import build_optimizer, set_learning_rates


def trained(folder: Path, kind: str, num_batches: int) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Return the weights after three steps of so many micro-batches, and the optimizer."""
    config = ModelConfig(LlmConfig(str(folder), "full"), dtype="float32")
    model = build_model(config)
    optimizer = build_optimizer(model, config, OptimConfig(kind=kind, weight_decay=0.1))  # type: ignore[arg-type]
    set_learning_rates(optimizer, 1.0)
    for step in range(3):
        micro_batches = [batch(0.3 + 0.2 * i) for i in range(num_batches)]
        steps.train_step(model, optimizer, micro_batches, ALONE, steps.StepOptions(seed=0, step=step, clip_norm=1.0))
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_weights_are_the_same_to_the_bit(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llm(tmp_path)
    settled, _ = trained(tmp_path, kind, 2)
    monkeypatch.setattr(steps, "allocate_zeros", lambda optimizer: None)
    update = steps.clipped_update
    monkeypatch.setattr(steps, "clipped_update", lambda *args, keeps_gradients: update(*args))
    plain, _ = trained(tmp_path, kind, 2)
    assert settled.keys() == plain.keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in settled.items())


@pytest.mark.parametrize("num_batches", [1, 2])
def test_gradients_stay_where_they_are_summed_and_are_freed_where_not(tmp_path: Path, num_batches: int) -> None:
    """With one micro-batch they are made while activations are freed, and would only add to the peak before."""
    save_llm(tmp_path)
    weights, optimizer = trained(tmp_path, "adamw", num_batches)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert len(gradients) == len(weights)
    assert all(grad is None if num_batches == 1 else grad is not None and not grad.any() for grad in gradients)
