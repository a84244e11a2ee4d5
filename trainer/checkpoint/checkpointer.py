"""Checkpoints: sharded safetensors and JSON, complete only once the manifest is written and the folder has its final name."""

from __future__ import annotations

import json
import platform
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from data.processor import Processor
from model.card import ModelCard, write_card
from model.files.manifest import Facts, write_manifest
from model.files.sharding import is_first_copy
from model.files.shards import WEIGHTS, Chunks, ShardPlan, local, plan_shard, tensor_chunks, write_planned
from model.files.tensor_files import dump_json
from trainer.checkpoint.background_save import Agreement, Task, attempt, raise_problem
from trainer.checkpoint.host_staging import SaveMemory
from trainer.checkpoint.retention import PREFIX, STATE, prune
from trainer.distributed.world import World
from trainer.machine.atomic_files import SAVING, TRIAL, make_folder, put_in_place, remove_folder, replace_text, sync_run
from trainer.machine.disk_space import SpaceNeeded, describe_shortage, format_bytes, warn_if_next_save_will_not_fit, written_bytes
from trainer.machine.memory_info import available_bytes
from trainer.optim import Trained
from trainer.optim_state import STEP
from trainer.state import CheckpointState


class Checkpointer:
    """Writes the checkpoints of one run folder beside training: one at a time, each complete before it gets its final name."""

    def __init__(self, folder: Path, keep: int, world: World, on_progress: Callable[[], None] = lambda: None) -> None:
        """Prepare to save into `folder`. Collective. `on_progress` is called when a save that training waits for makes progress."""
        self.folder, self.keep, self.world, self.on_progress = folder, keep, world, on_progress
        self.run_id = str(world.broadcast_json(uuid.uuid4().hex))
        self.agreement = Agreement(world.channel("save"), self.run_id, world.rank, world.size)
        self.task: Task | None = None
        self.memory: SaveMemory | None = None  # of the copies that are written beside training
        self.static_files: dict[str, bytes] | None = None  # files that are the same in all checkpoints, by name
        self.space: SpaceNeeded | None = None  # disk space that saves need, once it was proven that they fit
        self.num_chunks = self.num_reported = 0  # chunks written by this rank, and those reported to `on_progress`

    def prepare(self, trained: Trained, card: ModelCard, processor: Processor) -> None:
        """Reserve the memory of all saves, moments to come included, and build the files that are the same in all of them.

        Collective; the first save does it if nobody has. Raises SaveError on every rank when the folder cannot be written.
        """
        problem, static_files = attempt(
            lambda: _static_files(self.folder, card, processor) if self.world.is_main else {}, self.folder
        )
        needed = sum(local(t).nbytes for t in trained.saved().values() if is_first_copy(t, self.world.rank))
        answers = self.world.gather_json([problem, platform.node(), needed, available_bytes()])
        raise_problem(answers[0][0], self._message)
        self.static_files = static_files
        self.memory = SaveMemory(self.world, [(host, need, free) for _, host, need, free in answers])

    def expect(self) -> None:
        """Get memory for the save that follows the next step, beside that step. No collective."""
        if self.memory is not None and self.task is None:
            self.memory.expect()

    def save(
        self,
        step: int,
        trained: Trained,
        state: CheckpointState,
        card: ModelCard,
        processor: Processor,
        before: dict[Path, str] | None = None,
    ) -> Path:
        """Begin to write checkpoint-`step` and return its path. Called by every rank; `step` counts over the whole run.

        `before`: texts of other files of the run folder. Rank 0 writes them, and they are on disk before the checkpoint has its
        final name.

        All values are copied when it returns: weights, moments and `state` may change. It waits for the previous save first. Raises
        SaveError or ProofError when that save failed.
        """
        self.wait()
        if self.static_files is None:
            self.prepare(trained, card, processor)
        tensors = _tensors(trained, self.world)
        note = CheckpointMeta(step, json.loads(dump_json(state)), [*trained.parameters], _steps(trained), before or {})
        staging = self.memory.of_next_save() if self.memory else None
        work = partial(self._write, note, staging.take(tensors) if staging else tensors)
        self.task = Task(work, f"{PREFIX}{step}")
        if staging is None:
            self.wait()
        return self.folder / f"{PREFIX}{step}"

    def check(self) -> None:
        """Raise SaveError or ProofError if the save under way has failed. Called after every step: no collective, no waiting."""
        if self.task is not None and not self.task.under_way:
            self.wait()

    def wait(self) -> None:
        """Wait until no save is under way. Raises SaveError or ProofError on every rank when the save failed."""
        task, self.task = self.task, None
        if task is not None:
            task.outcome(self._report_progress)

    def _report_progress(self) -> None:
        """Call `on_progress` if this rank has written chunks since the last call."""
        if self.num_reported != self.num_chunks:
            self.num_reported = self.num_chunks
            self.on_progress()

    def drain(self, seconds: float) -> None:
        """Let a save under way finish, for at most `seconds`, in a run that has failed already. It raises nothing."""
        if self.task is not None:
            self.task.thread.join(seconds)

    def _write(self, note: CheckpointMeta, shard: ShardPlan | dict[str, Tensor]) -> None:
        """Write one checkpoint, in a thread of its own on every rank. The live model is not touched, unless training waits."""
        temporary = self.folder / f".{PREFIX}{note.step}{SAVING}-{self.run_id[:8]}"
        self.agreement.report(*attempt(lambda: self._write_shard(temporary, shard), self.folder))
        if self.world.is_main:
            problem, facts = self.agreement.reports()
            if not problem:
                problem, _ = attempt(lambda: self._finish(temporary, note, facts), self.folder)
            if problem:  # free the space first: reporting the problem may need it
                if problem[0] == "write" and self.space is not None:
                    problem[1] += f". {describe_shortage(self.folder, self.space.checkpoint, written_bytes(temporary))}"
                with suppress(OSError):
                    remove_folder(temporary)
            self.agreement.rule(problem)
            if not problem:
                _say_saved(note.step, facts)
        raise_problem(self.agreement.ruling(), self._message)

    def _write_shard(self, temporary: Path, shard: ShardPlan | dict[str, Tensor]) -> Facts:
        """Write the shard of this rank; return the facts of its files for the manifest."""
        make_folder(temporary)
        if isinstance(shard, dict):
            plan = plan_shard(shard)
            chunks: Chunks = partial(tensor_chunks, plan, shard)
        else:
            assert self.memory is not None and self.memory.staging is not None  # a plan alone comes from a staged copy
            self.memory.staging.ready()
            plan, chunks = shard, self.memory.staging.chunks

        def counted() -> Iterator[tuple[torch.dtype, memoryview]]:
            for chunk in chunks():
                yield chunk
                self.num_chunks += 1

        try:
            return write_planned(temporary, self.world.rank, self.world.size, plan, counted)
        finally:
            if self.memory is not None:
                self.memory.release()

    def _finish(self, temporary: Path, note: CheckpointMeta, facts: list[Facts]) -> None:
        """Complete the checkpoint on rank 0, when every shard is on disk: other files, manifest, final name, then pruning."""
        for name, data in (self.static_files or {}).items():
            (temporary / name).write_bytes(data)
        (temporary / STATE).write_text(dump_json(note.all()))
        stage = {"stage": note.state["stage"]} if note.state.get("stage") else {}
        known = {name: of for files in facts for name, of in files.items()}
        write_manifest(temporary, {"step": note.step, "run_id": self.run_id, **stage}, known)
        for path, text in note.before.items():
            replace_text(path, text)
        sync_run(self.folder)
        target = self.folder / f"{PREFIX}{note.step}"
        put_in_place(temporary, target)
        prune(self.folder, self.keep, target)
        if self.space is not None and (warning := warn_if_next_save_will_not_fit(self.space)):
            tqdm.write(warning)

    def _message(self, text: str) -> str:
        """Return the message of a SaveError or ProofError about a save of this folder."""
        return f"a checkpoint cannot be written to {self.folder}: {text}. Earlier checkpoints are intact"


def _say_saved(step: int, facts: list[Facts]) -> None:
    """Print one line about a checkpoint that is complete. A screen that is gone, as a pipe may be, does not fail the save."""
    size = sum(of["size"] for files in facts for of in files.values())
    with suppress(OSError):
        tqdm.write(f"saved     {PREFIX}{step}, {format_bytes(size)} of tensors")
        sys.stdout.flush()


@dataclass(frozen=True)
class CheckpointMeta:
    """Contents of a checkpoint beside tensors, as of the moment when the save was requested."""

    step: int
    state: CheckpointState
    names: list[str]
    optimizer_steps: Tensor  # (parameters,) on the device: read later, without a host sync in `save`
    before: dict[Path, str]

    def all(self) -> CheckpointState:
        """Return the content of the state file. Host sync."""
        steps = self.optimizer_steps.tolist()
        return {**self.state, "step": self.step, "optimizer_steps": dict(zip(self.names, steps, strict=True))}


def _static_files(folder: Path, card: ModelCard, processor: Processor) -> dict[str, bytes]:
    """Return the files that are the same in every checkpoint, by name: the model card and those of the processor.

    Called once, on the main thread: two threads must not use one tokenizer at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{TRIAL}static-", dir=folder) as name:
        write_card(card, Path(name))
        processor.save(Path(name))
        return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}


def _tensors(trained: Trained, world: World) -> dict[str, Tensor]:
    """Return the tensors that this rank writes: its shards of the first copy. Rank 0 writes those that all ranks hold whole."""
    found: dict[str, Tensor] = {}
    for name, parameter in trained.parameters.items():
        if not is_first_copy(parameter, world.rank):
            continue
        found[WEIGHTS + name] = parameter
        state = trained.optimizer.state.get(parameter, {})
        found |= {f"{key}/{name}": value for key, value in state.items() if key != STEP}
    return found


def _steps(trained: Trained) -> Tensor:
    """Return (parameters,) the number of updates of each, 0 where there was none yet. No host sync."""
    states = [trained.optimizer.state.get(parameter, {}) for parameter in trained.parameters.values()]
    device = next(iter(trained.parameters.values())).device
    return torch.stack([state[STEP] if STEP in state else torch.zeros((), device=device) for state in states])
