"""Checkpoints: sharded safetensors and JSON, complete only when the manifest is written and the folder has its name."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.processor import Processor
from model.card import ModelCard, write_card
from model.files import dump_json
from model.manifest import file_facts, write_manifest
from model.shards import WEIGHTS, checkpoint_tensors, write_shard
from model.weights import is_first_copy, local_range
from trainer.disk import fresh_folder, put_in_place, sync_run
from trainer.distributed import World
from trainer.exits import ProofError, SaveError
from trainer.retention import PREFIX, STATE, prune

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Trained:
    """What learns: parameters by full name, and the optimizer over them."""

    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer


class Checkpointer:
    """Writes, keeps and finds the checkpoints of one run folder."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self.run_id = str(world.broadcast_json(uuid.uuid4().hex))

    def save(self, step: int, trained: Trained, state: dict[str, Any], card: ModelCard, processor: Processor) -> Path:
        """Write checkpoint-`step`, counted over the whole run. Collective. SaveError on every rank when any of them fails; older
        ones stay as they are.
        """
        target = self.folder / f"{PREFIX}{step}"
        temporary = self.folder / f".{PREFIX}{step}.saving"
        self._together(lambda: fresh_folder(temporary), main_only=True)
        self._together(lambda: write_shard(temporary, self.world.rank, self.world.size, _tensors(trained, self.world)))
        # Each rank reads back its own shard: one rank alone would take as long as all of them together.
        own = self._together(lambda: file_facts(temporary, f"rank-{self.world.rank:05d}-*"))
        known = {name: facts for rank in own for name, facts in (rank or {}).items()}

        def finish() -> None:
            optimizer_steps = {name: _step_of(trained.optimizer, p) for name, p in trained.parameters.items()}
            (temporary / STATE).write_text(dump_json({**state, "step": step, "optimizer_steps": optimizer_steps}))
            write_card(card, temporary)
            processor.save(temporary)
            stage = {"stage": state["stage"]} if state.get("stage") else {}
            write_manifest(temporary, {"step": step, "run_id": self.run_id, **stage}, known)
            sync_run(self.folder)
            put_in_place(temporary, target)
            prune(self.folder, self.keep, target)

        self._together(finish, main_only=True)
        return target

    def check(self) -> None:
        """SaveError when the save under way has failed. Not a collective: called after every step, it looks and goes on."""

    def wait(self) -> None:
        """Until nothing is being saved any more. SaveError when that failed. Collective."""

    def _together(self, action: Callable[[], Any], *, main_only: bool = False) -> list[Any]:
        """Run on every rank or on rank 0; what each returned. All learn whether any failed, and all raise."""
        problem, found = "", None
        if not main_only or self.world.is_main:
            try:
                found = action()
            except OSError as error:
                problem = f"{error.strerror or error}: {error.filename or self.folder}"
        answers = self.world.gather_json([problem, found])
        problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if problems:
            raise SaveError(
                f"a checkpoint cannot be written to {self.folder}: {'; '.join(problems)}. Earlier checkpoints are intact"
            )

        return [answer for _, answer in answers]


def restore(folder: Path, trained: Trained, optimizer_steps: dict[str, float]) -> None:
    """Put a checkpoint's weights and moments into the live ones, each rank its own rows, whoever wrote them."""
    saved = checkpoint_tensors(folder)
    names = {name.removeprefix(WEIGHTS) for name in saved if name.startswith(WEIGHTS)}
    if names != set(trained.parameters):
        raise ProofError(f"{folder} holds other parameters than this run trains: {sorted(names ^ set(trained.parameters))[:5]}")
    for name, parameter in trained.parameters.items():
        _fill(parameter.data, saved, WEIGHTS + name)
        if f"{MOMENTS[0]}/{name}" not in saved:  # saved before its first update
            continue
        state: dict[str, Tensor] = {"step": torch.tensor(optimizer_steps[name], dtype=torch.float32, device=parameter.device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter.data)
            _fill(state[moment], saved, f"{moment}/{name}")
        trained.optimizer.state[parameter] = state


def _fill(tensor: Tensor, saved: dict[str, Any], name: str) -> None:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if saved[name].shape != tuple(tensor.shape):
        raise ProofError(f"{name} has shape {list(saved[name].shape)} in the checkpoint and {list(tensor.shape)} in the model")
    local.copy_(saved[name].read(*local_range(tensor)))


def _tensors(trained: Trained, world: World) -> dict[str, Tensor]:
    """What this rank writes: its shards of the first copy; of what all ranks hold whole, rank 0's copy only."""
    found: dict[str, Tensor] = {}
    for name, parameter in trained.parameters.items():
        if not is_first_copy(parameter, world.rank):
            continue
        found[WEIGHTS + name] = parameter.data
        for moment in MOMENTS:
            if moment in trained.optimizer.state.get(parameter, {}):
                found[f"{moment}/{name}"] = trained.optimizer.state[parameter][moment]
    return found


def _step_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    state = optimizer.state.get(parameter, {})
    return float(state["step"]) if "step" in state else 0.0
