"""Restoring the weights and the optimizer's state of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from model.files.sharding import local_range
from model.files.shards import WEIGHTS, checkpoint_tensors, local
from model.files.tensor_files import Tensors
from model.files.untrusted import shown
from trainer.checkpoint.retention import STATE
from trainer.errors import ProofError
from trainer.optim import Trained
from trainer.optim_state import STEP, new_state, rules_of
from trainer.state import CheckpointState


def restore(
    folder: Path, trained: Trained, optimizer_steps: dict[str, float], on_progress: Callable[[str], object] = lambda name: None
) -> None:
    """Load a checkpoint's weights and optimizer state into the live tensors: each rank reads its own rows, whatever wrote them.

    `on_progress` is called with each parameter name before it is read. Raises ProofError when the checkpoint holds other parameters
    or shapes than the run trains.
    """
    saved = checkpoint_tensors(folder)
    names = {name.removeprefix(WEIGHTS) for name in saved if name.startswith(WEIGHTS)}
    if names != set(trained.parameters):
        raise ProofError(f"{folder} holds other parameters than this run trains: {sorted(names ^ set(trained.parameters))[:5]}")
    rules = rules_of(trained.optimizer)
    for name, parameter in trained.parameters.items():
        on_progress(name)
        _fill(parameter.detach(), saved, WEIGHTS + name)  # not `.data`: copies made for computing go by the version counter
        state = new_state(rules[parameter], parameter)
        if not any(f"{key}/{name}" in saved for key in state):  # saved before the first update of this parameter
            continue
        for key, value in state.items():
            if key != STEP:
                _fill(value, saved, f"{key}/{name}")
            elif isinstance(optimizer_steps.get(name), int | float):
                value.fill_(optimizer_steps[name])
            else:
                raise ProofError(f"{folder / STATE} does not say how many updates {name} had")
        trained.optimizer.state[parameter] = state


def restore_loss_scale(folder: Path, trained: Trained, state: CheckpointState) -> None:
    """Go on with the loss scale of a checkpoint, where the run has one. Raises ProofError when the checkpoint has none."""
    if trained.loss_scale is None:
        return
    found = state.get("loss_scale")
    keys = ("scale", "updates")
    if not isinstance(found, dict) or not all(isinstance(found.get(key), int | float) for key in keys) or not found["scale"] > 0:
        raise ProofError(f"{folder / STATE} does not say which loss scale the run had reached: {shown(found)}")
    trained.loss_scale.restore(found)


def _fill(tensor: Tensor, saved: Tensors, name: str) -> None:
    """Copy this rank's rows of the saved tensor `name` into `tensor`. Raises ProofError when it is missing or has another shape."""
    if name not in saved or saved[name].shape != tuple(tensor.shape):
        found = list(saved[name].shape) if name in saved else "no values"
        raise ProofError(f"{name} has {found} in the checkpoint and shape {list(tensor.shape)} in the model")
    local(tensor).copy_(saved[name].read(*local_range(tensor)))
