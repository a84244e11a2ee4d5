"""final/: what was trained, streamed to rank 0 one parameter at a time, reopened and compared before the run says so."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.processor import Processor
from model.card import ModelCard, write_card
from model.files.proof import file_facts
from model.files.tensor_files import Entry, dump_json, tensor_digests, write_safetensors
from model.load import check_loadable, settled
from model.multimodal import MultimodalLM
from trainer.checkpoint.final_files import final_files
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError
from trainer.machine.atomic_files import SAVING, fresh_folder, put_in_place, remove_folder
from trainer.machine.disk_space import describe_shortage, final_bytes, written_bytes


def write_final(
    model: MultimodalLM, card: ModelCard, processor: Processor, folder: Path, step: int, world: World, alone: bool = False
) -> Path:
    """Write and prove `folder`/final. Collective. ProofError when what stands on disk is not what was trained.

    `alone`: it also holds what the run named by model.init_from has given, and needs that no more.
    """
    temporary, target = folder / f".final{SAVING}", folder / "final"
    problem, digests = "", {}
    check_masters(model)
    files = final_files(model, card, world, alone)
    try:
        if world.is_main:
            problem = _attempt(lambda: fresh_folder(temporary))
        _raise_together(problem, world, SaveError)
        for name, entries in files:
            digests[name] = _stream(temporary / name, entries, world)
        if world.is_main:
            problem = _attempt(lambda: _finish(temporary, target, card, processor, digests, step, folder))
        _raise_together(problem, world, SaveError)
    except SaveError as error:  # on every rank
        told = _give_back(temporary, final_bytes(files)[0]) if world.is_main else ""
        raise SaveError(
            f"{target} cannot be written: {error}. {world.broadcast_json(told)}. Checkpoints are intact: the same command goes on"
        ) from error
    return target


def _give_back(temporary: Path, needed: int) -> str:
    """What was missing, told before what was written is removed: exit.json needs room, too."""
    told = describe_shortage(temporary.parent, needed, written_bytes(temporary))
    with suppress(OSError):
        remove_folder(temporary)
    return told


def check_masters(model: MultimodalLM) -> None:
    """What learns is at hand in float32; anything else would be a copy made for computing."""
    if rounded := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]:
        raise ProofError(f"{len(rounded)} trained parameters are not float32, for example {rounded[0]}: final/ would be rounded")


def _stream(path: Path, entries: dict[str, Entry], world: World) -> dict[str, str]:
    """Write one file; returns the digest of each tensor as it was when it was written. Collective. SaveError on every rank."""
    out = Drain(path) if world.is_main else None
    try:
        digests = write_safetensors(out, entries)  # type: ignore[arg-type]
    finally:
        if out is not None:
            out.close()
    _raise_together("" if out is None or out.error is None else f"{out.error.strerror}: {path}", world, SaveError)
    return digests


class Drain:
    """A new file that takes everything and writes nothing after its first failure, be it that it cannot be opened: the other ranks
    are inside the next gather, and would wait there for a rank that has left.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self.file: BinaryIO | None = None
        try:
            self.file = path.open("wb")
        except OSError as error:
            self.error = error

    def write(self, data: bytes) -> None:
        if self.file is not None and self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """What was held back goes to the disk, or is an error as well."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:
                self.error = self.error or error


def _finish(
    temporary: Path, target: Path, card: ModelCard, processor: Processor, digests: dict[str, dict[str, str]], step: int, run: Path
) -> None:
    write_card(settled(temporary, card), temporary)
    processor.save(temporary)
    prove(temporary, digests)
    provenance = {
        "run": str(run),
        "step": step,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
    }
    (temporary / "provenance.json").write_text(dump_json(provenance))
    put_in_place(temporary, target)


def final_step(folder: Path) -> int | None:
    """The step that final/ holds."""
    try:
        step = json.loads((folder / "final" / "provenance.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # there is none, or it was edited: it will be written again
    return step if isinstance(step, int) else None


def publish(source: Path, target: Path, world: World) -> None:
    """The proven folder `source` stands at `target` as well: the same files under a second name where the disk can do that, else
    copies. Nothing is done if it is there already. Collective.
    """
    problem = ""
    if world.is_main and not _same_proof(source, target):
        problem = _attempt(lambda: _link(source, target))
    _raise_together(problem, world, SaveError)


def _same_proof(source: Path, target: Path) -> bool:
    facts = [folder / name for name in ("provenance.json", "proof.json") for folder in (source, target)]
    return all(path.is_file() for path in facts) and all(a.read_bytes() == b.read_bytes() for a, b in zip(facts[::2], facts[1::2]))


def _link(source: Path, target: Path) -> None:
    temporary = target.with_name(f".final{SAVING}")
    fresh_folder(temporary)
    for path in sorted(source.iterdir()):
        try:
            (temporary / path.name).hardlink_to(path)
        except OSError:
            shutil.copy2(path, temporary / path.name)
    put_in_place(temporary, target)


def prove(folder: Path, digests: dict[str, dict[str, str]]) -> None:
    """Reopen every file, compare each tensor's bytes with the live weight's, resolve every parameter of the model anew."""
    for name, expected in digests.items():
        found = dict(tensor_digests(folder / name))
        if wrong := sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key)):
            raise ProofError(f"{folder / name}: {len(wrong)} tensors differ from the trained ones: {wrong[:3]}")
    check_loadable(folder)
    files = {name: {**file_facts(folder / name), "tensors": len(tensors)} for name, tensors in digests.items()}
    proof: dict[str, Any] = {"files": files, "compared": "every tensor's bytes, after reopening, with the live weights"}
    (folder / "proof.json").write_text(dump_json(proof))


def _attempt(action: Any) -> str:
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or ''}"
    except Exception as error:
        return f"proof: final/ cannot be used: {error}"
    return ""


def _raise_together(problem: str, world: World, kind: type[Exception]) -> None:
    """Collective: every rank raises what rank 0 found."""
    text = world.broadcast_json(problem)
    if text:
        raise (ProofError if text.startswith("proof: ") else kind)(text.removeprefix("proof: "))
