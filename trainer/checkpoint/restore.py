"""Restoring the weights and the optimizer moments of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.files.sharding import local_range
from model.files.shards import MOMENTS, WEIGHTS, checkpoint_tensors
from model.files.tensor_files import Tensors
from trainer.checkpoint.retention import STATE
from trainer.errors import ProofError
from trainer.optim import Trained


def restore(
    folder: Path, trained: Trained, optimizer_steps: dict[str, float], on_progress: Callable[[str], object] = lambda name: None
) -> None:
    """Load a checkpoint's weights and moments into the live tensors: each rank reads its own rows, whatever ranks wrote them.

    `on_progress` is called with each parameter name before it is read. Raises ProofError when the checkpoint holds other parameters
    or shapes than the run trains.
    """
    saved = checkpoint_tensors(folder)
    names = {name.removeprefix(WEIGHTS) for name in saved if name.startswith(WEIGHTS)}
    if names != set(trained.parameters):
        raise ProofError(f"{folder} holds other parameters than this run trains: {sorted(names ^ set(trained.parameters))[:5]}")
    for name, parameter in trained.parameters.items():
        on_progress(name)
        _fill(parameter.detach(), saved, WEIGHTS + name)  # not `.data`: copies made for computing go by the version counter
        if f"{MOMENTS[0]}/{name}" not in saved:  # saved before the first update of this parameter
            continue
        if not isinstance(optimizer_steps.get(name), int | float):
            raise ProofError(f"{folder / STATE} does not say how many updates {name} had")
        state: dict[str, Tensor] = {"step": torch.tensor(optimizer_steps[name], dtype=torch.float32, device=parameter.device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter.data)
            _fill(state[moment], saved, f"{moment}/{name}")
        trained.optimizer.state[parameter] = state


def _fill(tensor: Tensor, saved: Tensors, name: str) -> None:
    """Copy this rank's rows of the saved tensor `name` into `tensor`. Raises ProofError when it is missing or has another shape."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if name not in saved or saved[name].shape != tuple(tensor.shape):
        found = list(saved[name].shape) if name in saved else "no values"
        raise ProofError(f"{name} has {found} in the checkpoint and shape {list(tensor.shape)} in the model")
    local.copy_(saved[name].read(*local_range(tensor)))
