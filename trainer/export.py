"""final/: what was trained, streamed to rank 0 one parameter at a time, reopened and compared before the run says so."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.processor import Processor
from model.build import DTYPES
from model.card import ModelCard, write_card
from model.files import SHARD_BYTES, Entry, dump_json, split_by_size, tensor_digests, write_safetensors
from model.load import check_loadable, inherited_tensors, settled
from model.lora import is_adapter
from model.multimodal import MultimodalLM
from model.new_tokens import FILE as NEW_ROWS
from model.new_tokens import is_new_rows
from model.peft import OURS
from model.proof import file_facts
from trainer.disk import put_in_place
from trainer.distributed import World
from trainer.exits import ProofError, SaveError
from trainer.gather import gather_hooks


def write_final(
    model: MultimodalLM, card: ModelCard, processor: Processor, folder: Path, step: int, world: World, alone: bool = False
) -> Path:
    """Write and prove `folder`/final. Collective. ProofError when what stands on disk is not what was trained.

    `alone`: it also holds what the run named by model.init_from has given, and needs that no more.
    """
    temporary, target = folder / ".final.saving", folder / "final"
    problem, digests = "", {}
    check_masters(model)
    files = list(weight_files_of(model, card))
    if alone and card.model.init_from:
        files = with_inherited(files, card, world)
    if world.is_main:
        problem = _attempt(lambda: _prepare(temporary))
    _raise_together(problem, world, SaveError)
    for name, entries in files:
        digests[name] = _stream(temporary / name, entries, world)
    if world.is_main:
        problem = _attempt(lambda: _finish(temporary, target, card, processor, digests, step, folder))
    _raise_together(problem, world, ProofError if problem.startswith("proof: ") else SaveError)
    return target


def check_masters(model: MultimodalLM) -> None:
    """What learns is at hand in float32; anything else would be a copy made for computing."""
    if rounded := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]:
        raise ProofError(f"{len(rounded)} trained parameters are not float32, for example {rounded[0]}: final/ would be rounded")


def weight_files_of(model: MultimodalLM, card: ModelCard) -> Iterator[tuple[str, dict[str, Entry]]]:
    """File names and what goes into each: bases rounded once to the model's dtype, all else in float32."""
    for name, part in card.model.parts().items():
        is_ours = name.endswith("_projector") or name == "state_head"
        tensors = dict(model.get_submodule(name).named_parameters())
        if part.tune == "positions":
            tensors = {inner: p for inner, p in tensors.items() if p.requires_grad}
        # What is ours is small and in no base: it is there even if it did not learn.
        if part.tune in ("full", "positions") or is_ours:
            dtype = DTYPES[card.model.dtype] if part.tune == "full" and not is_ours else torch.float32
            yield from split_files(name, _entries(tensors, dtype))
    adapters = {
        name: p
        for name, p in model.named_parameters()
        if is_adapter(name) or (p.requires_grad and name.partition(".")[0] in card.lora_parts)
    }
    if rows := {name: p for name, p in model.named_parameters() if is_new_rows(name)}:
        yield NEW_ROWS, _entries(rows, torch.float32)
    if adapters:
        yield OURS, _entries(adapters, torch.float32)


Files = list[tuple[str, dict[str, Entry]]]


def with_inherited(files: Files, card: ModelCard, world: World) -> Files:
    """The same with what earlier runs trained or merged and this one left as it was: read from their files, not from the live
    model, which may have it rounded.
    """
    held = {name if file in (OURS, NEW_ROWS) else f"{part_of(file)}.{name}" for file, entries in files for name in entries}
    added: dict[str, dict[str, Entry]] = {}
    for name, rows in inherited_tensors(card, held).items():
        part, _, inner = name.partition(".")
        # A quantised matrix is packed again from what stands here: it must be the very values it was packed from.
        rounds = part in card.hugging_face and card.quantize.bits == 16
        value = rows.all if world.is_main else _nothing
        added.setdefault(part, {})[inner] = Entry(DTYPES[card.model.dtype] if rounds else torch.float32, rows.shape, value)
    for part, entries in added.items():
        own = {name: entry for file, group in files if part_of(file) == part for name, entry in group.items()}
        files = [item for item in files if part_of(item[0]) != part] + list(split_files(part, {**own, **entries}))
    return files


def _nothing() -> None:
    """What ranks other than 0 have to give to a file of which rank 0 reads all."""


def part_of(file: str) -> str:
    return Path(file).stem.partition("-")[0]


def split_files(part: str, entries: dict[str, Entry]) -> Iterator[tuple[str, dict[str, Entry]]]:
    """The weights of a part as one file, or as many as they need."""
    groups = [group for group in split_by_size(entries, SHARD_BYTES) if group]
    for i, group in enumerate(groups, 1):
        suffix = "" if len(groups) == 1 else f"-{i:05d}-of-{len(groups):05d}"
        yield f"{part}{suffix}.safetensors", group


def _entries(tensors: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Entry]:
    """Each tensor with the hook that makes it whole on rank 0 when the writer gets to it."""
    hooks = gather_hooks(tensors)
    return {name: Entry(dtype, tuple(t.shape), hooks[name]) for name, t in tensors.items()}


def _stream(path: Path, entries: dict[str, Entry], world: World) -> dict[str, str]:
    """Write one file; returns the digest of each tensor as it was when it was written. Collective."""
    problem, out = "", None
    with ExitStack() as stack:
        if world.is_main:
            try:
                out = stack.enter_context(path.open("wb"))
            except OSError as error:
                problem = f"{error.strerror}: {path}"
        _raise_together(problem, world, SaveError)
        try:
            return write_safetensors(out, entries)
        except OSError as error:
            # The others are inside the next gather: this rank must leave, and they will be told by its absence.
            raise SaveError(f"{error.strerror}: {path}") from error


def _prepare(temporary: Path) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


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
    path = folder / "final" / "provenance.json"
    return json.loads(path.read_text())["step"] if path.is_file() else None


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
    temporary = target.with_name(".final.saving")
    _prepare(temporary)
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
