"""Writer of final/: streams trained weights to rank 0 parameter by parameter; proves them before it reports success.

Proving means that the files are reopened and compared with the live weights.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from data.processor import Processor
from model.card import ModelCard, write_card
from model.files.proof import proof_entry
from model.files.tensor_files import Entry, dump_json, tensor_digests, write_safetensors
from model.load import card_without_init_from, check_loadable
from model.multimodal import MultimodalLM
from trainer.checkpoint.final_files import final_files
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError
from trainer.machine.atomic_files import SAVING, fresh_folder, put_in_place, remove_folder
from trainer.machine.disk_space import describe_shortage, final_bytes, written_bytes


@dataclass(frozen=True)
class FinalRun:
    """Facts that final/ records beside the weights."""

    card: ModelCard
    processor: Processor
    folder: Path  # of the run or stage
    step: int  # completed steps of the run
    name: str = "final"  # of the folder in it


def write_final(model: MultimodalLM, run: FinalRun, world: World, *, alone: bool = False) -> Path:
    """Write final/, or the folder that `run` names, prove it and return its path. Collective.

    `alone`: it also holds the tensors that come from the run named by model.init_from, and does not need that run any more. Raises
    ProofError when the files on disk are not what was trained, SaveError when they cannot be written.
    """
    temporary, target = run.folder / f".{run.name}{SAVING}", run.folder / run.name
    digests: dict[str, dict[str, str]] = {}
    # One of another dtype would be a rounded copy made for computing.
    if rounded := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]:
        raise ProofError(f"{len(rounded)} trained parameters are not float32, for example {rounded[0]}: final/ would be rounded")
    files = final_files(model, run.card, world, alone)
    try:
        _write_together(world, lambda: fresh_folder(temporary))
        for name, entries in files:
            digests[name] = _stream(temporary / name, entries, world)
        _write_together(world, lambda: _finish(temporary, target, run, digests))
    except SaveError as error:  # on every rank
        hint = on_main_rank(world, lambda: _discard(temporary, final_bytes(files)[0]))
        raise SaveError(f"{target} cannot be written: {error}. {hint}. Checkpoints are intact: the same command goes on") from error
    return target


def _discard(temporary: Path, needed: int) -> str:
    """Remove the unfinished folder, so that exit.json has space; return what was missing before that."""
    shortage = describe_shortage(temporary.parent, needed, written_bytes(temporary))
    with suppress(OSError):
        remove_folder(temporary)
    return shortage


def _stream(path: Path, entries: dict[str, Entry], world: World) -> dict[str, str]:
    """Write one file; return the digest that each tensor had when it was written. Collective. Raises SaveError on every rank."""
    out = Drain(path) if world.is_main else None
    try:
        digests = write_safetensors(out, entries)  # type: ignore[arg-type]
    finally:
        if out is not None:
            out.close()
    if problem := world.broadcast_json("" if out is None or out.error is None else f"{out.error.strerror}: {path}"):
        raise SaveError(problem)
    return digests


class Drain:
    """A new file that accepts all data and writes nothing after its first failure, which may be that it cannot be opened.

    The writer must not stop at a failure: the other ranks are inside the next gather, and would wait there for a rank that left.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self.file: BinaryIO | None = None
        try:
            self.file = path.open("wb")
        except OSError as error:
            self.error = error

    def write(self, data: bytes) -> None:
        """Write `data`, unless a write failed before; keep the error of a failure."""
        if self.file is not None and self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """Close the file, which flushes it; keep the error of a failure."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:
                self.error = self.error or error


def _finish(temporary: Path, target: Path, run: FinalRun, digests: dict[str, dict[str, str]]) -> None:
    """Add card, processor and provenance to the unfinished folder, prove its weights and give it its final name."""
    write_card(card_without_init_from(temporary, run.card), temporary)
    run.processor.save(temporary)
    prove(temporary, digests)
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    provenance = {"run": str(run.folder), "step": run.step, "written": written, "torch": torch.__version__}
    (temporary / "provenance.json").write_text(dump_json(provenance))
    put_in_place(temporary, target)


def final_step(folder: Path, name: str = "final") -> int | None:
    """Return the step that final/ holds, or the folder `name` beside it; None when there is no readable one."""
    try:
        step = json.loads((folder / name / "provenance.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # missing or edited: final/ will be written again
    return step if isinstance(step, int) else None


def publish(source: Path, target: Path, world: World) -> None:
    """Make the proven folder `source` available at `target` as well: hard links where the disk supports them, else copies.

    Nothing is done if the same final/ is there already. Collective. Raises SaveError on every rank when it cannot be written.
    """
    _write_together(world, lambda: None if _same_proof(source, target) else _link(source, target))


def _same_proof(source: Path, target: Path) -> bool:
    """Return whether both folders hold the same provenance and proof."""
    facts = [folder / name for name in ("provenance.json", "proof.json") for folder in (source, target)]
    return all(path.is_file() for path in facts) and all(a.read_bytes() == b.read_bytes() for a, b in zip(facts[::2], facts[1::2]))


def _link(source: Path, target: Path) -> None:
    """Put the files of `source` into `target`, as hard links or copies, atomically."""
    temporary = target.with_name(f".{target.name}{SAVING}")
    fresh_folder(temporary)
    for path in sorted(source.iterdir()):
        try:
            (temporary / path.name).hardlink_to(path)
        except OSError:
            shutil.copy2(path, temporary / path.name)
    put_in_place(temporary, target)


def prove(folder: Path, digests: dict[str, dict[str, str]]) -> None:
    """Reopen every file, compare each tensor's bytes with the live weight's, find every parameter anew and write proof.json.

    Raises ProofError when a tensor differs, the errors of `check_loadable` when a parameter has no value of its shape.
    """
    for name, expected in digests.items():
        found = dict(tensor_digests(folder / name))
        if wrong := sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key)):
            raise ProofError(f"{folder / name}: {len(wrong)} tensors differ from the trained ones: {wrong[:3]}")
    check_loadable(folder)
    files = {name: {**proof_entry(folder / name), "tensors": len(tensors)} for name, tensors in digests.items()}
    proof = {"files": files, "compared": "every tensor's bytes, after reopening, with the live weights"}
    (folder / "proof.json").write_text(dump_json(proof))


def _write_together(world: World, write: Callable[[], None]) -> None:
    """Call `write` on rank 0. Raises on every rank SaveError for a file that cannot be written, ProofError for any other error."""

    def written() -> None:
        try:
            write()
        except OSError as error:
            raise SaveError(f"{error.strerror or error}: {error.filename or ''}") from error
        except Exception as error:
            raise ProofError(f"final/ cannot be used: {error}") from error

    on_main_rank(world, written)
