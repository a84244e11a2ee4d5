"""Note of a start, start.json: the plan that it printed, what learns, how far it goes, and the machine. Pages show it."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from model.files.tensor_files import dump_json
from model.files.untrusted import Json
from model.trainable import part_table
from trainer.checkpoint.resume import StageStart
from trainer.checkpoint.retention import set_aside, step_of
from trainer.distributed.world import World
from trainer.machine.atomic_files import replace_text
from trainer.machine.memory_info import usage
from trainer.optim import learning_rates
from trainer.report import describe_run
from trainer.runfile.schema import to_tables
from trainer.runfile.toml_files import to_toml
from trainer.setup import PreparedRun

NAME = "start.json"


def write_plan(prepared: PreparedRun, start: StageStart, first_step: int, chosen: str) -> None:
    """Print the plan of a stage that goes on behind `first_step` steps of its own; write run.toml and start.json. For rank 0.

    Checkpoints beyond the one that the user named as the beginning are moved aside: they would be mistaken for this run's.
    `chosen`: a line about what was chosen at the start, which run.toml holds as a comment.
    """
    stage, notes = prepared.stage, start.notes
    if start.checkpoint and stage.config.checkpoint.resume not in ("auto", "none"):
        notes = [*notes, *set_aside(stage.run_folder, step_of(start.checkpoint))]
    plan = describe_run(prepared, start.checkpoint if start.state else None, notes)
    comment = f"# {chosen}\n" if chosen else ""
    replace_text(stage.run_folder / "run.toml", to_toml(to_tables(stage.root)) + comment)
    write_start(prepared, first_step, plan)
    print(plan, flush=True)


def write_start(prepared: PreparedRun, first_step: int, plan: str) -> None:
    """Write start.json of a run or stage that goes on behind `first_step` steps of its own. For rank 0.

    `plan`: as it was printed.
    """
    stage, config = prepared.stage, prepared.config
    rates = learning_rates(config.model, config.optim)
    parts = [
        {**asdict(row), "lr": rates.get(row.part) if row.num_trainable else None}
        for row in part_table(prepared.model, config.model)
    ]
    note = {
        "at": round(time.time(), 3),  # seconds since 1970
        "stage": stage.name,
        "number": stage.number,
        "count": stage.count,
        "step": stage.first_step + first_step,
        "last_step": stage.first_step + prepared.total_steps,
        "parts": parts,
        "machine": describe_machine(prepared.world),
        "plan": plan,
    }
    replace_text(Path(stage.run_folder, NAME), dump_json(note))


def describe_machine(world: World) -> Json:
    """Describe where a run computes, without a name of the machine or of a person."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    return {
        "device": f"{world.size} x {device}" if world.device.type == "cuda" else f"{world.size} process(es) on {device}",
        "memory_gib": round(usage(world.device).total / 2**30, 1),
        "cores": os.cpu_count() or 0,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
