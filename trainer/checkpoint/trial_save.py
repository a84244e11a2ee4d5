"""Trial save before training: the whole path of a save, with one small tensor of each rank, before there is work to lose."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from model.files.manifest import verify, write_manifest
from model.files.sharding import is_first_copy
from model.files.shards import WEIGHTS, local, write_shard
from model.files.tensor_files import dump_json
from trainer.checkpoint.background_save import attempt
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.final_files import final_files
from trainer.checkpoint.retention import PREFIX, STATE, checkpoints, is_whole, prune
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.errors import SaveError
from trainer.machine.atomic_files import SAVING, TRIAL, fresh_folder, put_in_place, remove_folder
from trainer.machine.disk_space import (
    ADVICE,
    SpaceNeeded,
    checkpoint_bytes,
    describe_shortage,
    final_bytes,
    format_bytes,
    free_bytes,
    prove_space,
)
from trainer.setup import PreparedRun
from trainer.state import CheckpointState


def prove_saving(prepared: PreparedRun, checkpointer: Checkpointer, step: int, state: CheckpointState) -> SpaceNeeded:
    """Prove that checkpoints can be written and that the next ones fit; return the space they need. Collective.

    `step`: completed steps of the run. `state`: what a checkpoint records of them. Where space is missing, checkpoints beyond
    checkpoint.keep are removed: that setting may have been lowered. Raises SaveError on every rank when a save fails or the next
    ones do not fit.
    """
    stage, world, folder = prepared.stage, prepared.world, prepared.stage.run_folder
    parameters = prepared.trained.parameters if prepared.trained else {}
    final, final_largest = final_bytes(final_files(prepared.model, prepared.data.card, world, bool(stage.name)))
    shards, largest = checkpoint_bytes(prepared.trained.saved() if prepared.trained else {}, world)
    if checkpointer.static_files is None and prepared.trained:
        checkpointer.prepare(prepared.trained, prepared.data.card, prepared.data.processor)
    problem, others = trial_save(folder, step, parameters, state, checkpointer.static_files or {}, world)
    if problem:
        shortage = world.broadcast_json(describe_shortage(folder, shards + final) if world.is_main else "")
        raise SaveError(f"nothing can be saved to {folder}, found out before training: {problem}. {shortage}")
    # final/ holds the card and the processor files as well, of the same size.
    best = prepared.config.checkpoint.best
    space = SpaceNeeded(folder, shards + others, final + others, max(largest, final_largest), checkpointer.keep, bool(best))
    if world.is_main and free_bytes(folder) < space.checkpoint + space.final:
        newest = folder / f"{PREFIX}{step}"
        if newest.is_dir() and is_whole(newest):
            with suppress(OSError):
                prune(folder, checkpointer.keep, newest)
    on_main_rank(world, lambda: prove_space(space))
    if world.is_main:
        print(f"disk      {space}{space_warning(space)}", flush=True)
    return space


def space_warning(space: SpaceNeeded) -> str:
    """Return a warning for when the next checkpoint fits, but not as many as are to be kept; "" when they fit."""
    free, held = free_bytes(space.folder), len(checkpoints(space.folder)) * space.checkpoint
    missing = space.in_the_long_run - held - free
    if missing <= 0:
        return ""
    return f"; {format_bytes(missing)} ARE MISSING for as many checkpoints: the run will end when the disk is full. {ADVICE}"


def trial_save(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    state: CheckpointState,
    static_files: Mapping[str, bytes],
    world: World,
) -> tuple[str, int]:
    """Save a checkpoint of one small tensor per rank, then remove it. Collective.

    Returns what went wrong on which ranks ("" if nothing did), and the bytes of all files of a checkpoint beside the tensors.
    """
    temporary, target = folder / f"{TRIAL}save{SAVING}", folder / f"{TRIAL}save"
    if problem := _describe(world.gather_json(attempt(lambda: fresh_folder(temporary), folder)[0] if world.is_main else [])):
        return problem, 0
    failed, facts = attempt(lambda: write_shard(temporary, world.rank, world.size, _small(parameters, world)), folder)
    answers = world.gather_json([failed, facts])
    known = {name: of for _, files in answers for name, of in (files or {}).items()}
    if problem := _describe([failed for failed, _ in answers]):
        return problem, 0

    def finish() -> int:
        for name, data in static_files.items():
            (temporary / name).write_bytes(data)
        text = dump_json({**state, "step": step, "optimizer_steps": dict.fromkeys(parameters, float(step))})
        (temporary / STATE).write_text(text)
        write_manifest(temporary, {"step": step, "run_id": TRIAL}, known)
        verify(temporary, f"{PREFIX}{step}")
        total = sum(path.stat().st_size for path in temporary.iterdir() if path.name not in known)
        put_in_place(temporary, target)
        remove_folder(target)
        return total

    failed, total = attempt(finish, folder) if world.is_main else ([], 0)
    if failed:
        with suppress(OSError):
            remove_folder(temporary)
    problem = _describe(world.gather_json(failed))
    return problem, int(world.broadcast_json(total) or 0)


def _small(parameters: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return the smallest tensor that this rank will save rows of; {} when it saves none."""
    own = {name: p.detach() for name, p in parameters.items() if is_first_copy(p, world.rank) and local(p).numel()}
    name = min(own, key=lambda name: (local(own[name]).numel(), name), default=None)
    return {} if name is None else {WEIGHTS + name: own[name]}


def _describe(failures: list[list[str]]) -> str:
    """Return the failures of all ranks as one text, "" without any."""
    return "; ".join(f"rank {rank}: {failed[1]}" for rank, failed in enumerate(failures) if failed)
