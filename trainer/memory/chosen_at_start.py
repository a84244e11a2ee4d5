"""Choice of a start in place of `parallel.activation_checkpointing = "auto"`: the same on every rank."""

from __future__ import annotations

import socket
from dataclasses import replace

from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.machine.memory_info import usage
from trainer.memory.advice import MemoryScenario
from trainer.memory.fit_plan import heaviest_of
from trainer.memory.recomputation import KINDS, Choice, choose
from trainer.records.run_data import RunData
from trainer.runfile.stages import Stage
from trainer.state import CheckpointState


def settle_recomputation(stage: Stage, data: RunData, world: World, state: CheckpointState | None) -> tuple[Stage, str]:
    """Return the stage with none, selective or full in place of "auto", the same on every rank, and a line for people. Collective.

    A resumed stage keeps what was chosen as long as its number of ranks stays; the numbers of training do not depend on it.
    """
    parallel = stage.config.parallel
    if parallel.activation_checkpointing != "auto":
        return stage, ""
    memory = memory_of_a_rank(world)
    answer: list[str] = ["", "", ""]
    if world.is_main:
        try:
            found = kept_choice(state, world) or choose(scenario_of(stage.config, data, world), memory)
            answer = ["", found.kind, found.reason]
        except Exception as error:  # the other ranks wait for an answer
            answer = [f"{type(error).__name__}: {error}", "", ""]
    problem, chosen, reason = world.broadcast_json(answer)  # collective
    if problem:
        raise ConfigError(f"parallel.activation_checkpointing = 'auto' cannot be decided ({problem}): name none, selective or full")
    kind = next(kind for kind in KINDS if kind == chosen)
    config: RunConfig = replace(stage.config, parallel=replace(parallel, activation_checkpointing=kind))
    return replace(stage, config=config), f"parallel.activation_checkpointing = 'auto' chose '{kind}': {reason}"


def scenario_of(config: RunConfig, data: RunData, world: World) -> MemoryScenario:
    """Return what the plan weighs, for ranks on the devices of `world`."""
    return replace(heaviest_of(config, data, world.size)[0], on_host=world.device.type == "cpu")


def kept_choice(state: CheckpointState | None, world: World) -> Choice | None:
    """Return what a checkpoint of as many ranks was trained with; None where there is none."""
    if state is None or state.get("num_ranks") != world.size:
        return None
    kind = next((kind for kind in KINDS if kind == state.get("activation_checkpointing")), None)
    return kind and Choice(kind, "as in the checkpoint")


def memory_of_a_rank(world: World) -> float:
    """Return the bytes that the rank with least could still take; ranks of one machine share the CPU's. Collective, host sync."""
    mine = {"free": usage(world.device).free, "host": socket.gethostname()}
    rows = world.gather_json(mine)
    hosts = [row["host"] for row in rows]
    return min(row["free"] / (1 if world.device.type == "cuda" else hosts.count(row["host"])) for row in rows)
