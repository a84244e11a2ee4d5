"""Which checkpoints a run folder holds, which of them is the one to go on from, and which may go."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.card import NAME as CARD
from model.files.manifest import UnsoundCheckpoint, changed, check_sizes
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError
from trainer.machine.atomic_files import move, move_aside, places, remove_folder

PREFIX = "checkpoint-"
STATE = "state.json"
SHOWN_BYTES = 1 << 30
"""A checkpoint from this size on shows how far its verification is."""


def prune(folder: Path, keep: int, written: Path) -> None:
    """Remove sound checkpoints but the newest `keep`, among them `written`, the one just saved, and those something starts from.

    Unsound ones do not count, and stay for a start to move aside: so the last sound one never goes. OSError when one cannot.
    """
    sound = [path for path in reversed(checkpoints(folder)) if is_whole(path)]
    kept = {written, *sound[:keep]}
    if doomed := [path for path in sound if path not in kept]:
        needed = bases(folder, written)
        for path in reversed(doomed):  # oldest first: what is left of them is always the newest
            if path.resolve() not in needed:
                remove_folder(path)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is sound as far as names and sizes tell."""
    try:
        check_sizes(path)
        return True
    except UnsoundCheckpoint:
        return False


def bases(folder: Path, written: Path) -> frozenset[Path]:
    """Checkpoints of `folder` that the run starts from, or that one of its final/ folders needs, directly or through another.

    What the run starts from is named somewhere in its settings, as model.init_from, checkpoint.resume or a path of a part; they
    stand in the state of `written`. A final/ names what it needs in its card.
    """
    named = list(_strings(_json(written / STATE).get("config")))
    named += [text for place in places(folder) for text in _origins(place / "final")]
    found: set[Path] = set()
    while named:
        path = checkpoint_of(folder, named.pop())
        if path is not None and path not in found:
            found.add(path)
            named += _origins(path)
    return frozenset(found)


def checkpoint_of(folder: Path, text: str) -> Path | None:
    """The checkpoint of `folder` that a path leads to or into."""
    if PREFIX not in text or "\0" in text:
        return None
    path, top = Path(text).resolve(), folder.resolve()
    return next((p for p in (path, *path.parents) if p.parent == top and p.name.startswith(PREFIX)), None)


def _origins(folder: Path) -> list[str]:
    return list(_strings(_json(folder / CARD).get("model")))


def _json(path: Path) -> dict[str, Any]:
    """What a file of ours says; nothing where there is none, as a final/ is not there yet."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise OSError(errno.EIO, f"cannot be read ({error})", str(path)) from error
    return value if isinstance(value, dict) else {}


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def checkpoints(folder: Path) -> list[Path]:
    """Folders named checkpoint-N, oldest first; links to some among them, which nothing is ever read from."""
    names = {p: p.name.removeprefix(PREFIX) for p in folder.glob(f"{PREFIX}*") if p.is_dir()}
    return sorted((p for p, name in names.items() if name.isascii() and name.isdigit()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step`: a run that goes back there takes another way, and would mistake them for its own."""
    told = []
    for path in checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            move_aside(path, aside)
            told.append(f"{path} is beyond step {step}; moved to {aside.name}")
    return told


def newest_sound(folder: Path, world: World | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as its manifest says, and what was wrong with newer ones, which are moved away.

    Collective: rank 0 lists and moves, all ranks read; without a world, this process by itself. ProofError when there are
    checkpoints and none is sound: that is never a fresh start.
    """
    world = world or World(0, 0, 1, torch.device("cpu"))
    damaged: list[str] = []
    names = world.broadcast_json([path.name for path in reversed(checkpoints(folder))] if world.is_main else None)
    for name in names:
        problem = verify_together(folder / name, world)
        if not problem:
            return folder / name, damaged
        damaged.append(f"{problem}; moved to {_move_damaged(folder / name, world)}")
    if damaged or world.broadcast_json(any(folder.glob(f"damaged-{PREFIX}*"))):
        raise ProofError(
            f"{folder} has checkpoints and none is sound: {'; '.join(damaged) or 'all were moved aside before'}. "
            "Restore one from a copy, use another output_dir, or remove the damaged- folders to start anew"
        )
    return None, []


def _move_damaged(path: Path, world: World) -> str:
    """The name under which rank 0 put it. What was moved aside before stays: it may be all that is left. Collective."""
    aside, number, problem = path.with_name(f"damaged-{path.name}"), 1, ""
    if world.is_main:
        while os.path.lexists(aside):
            number += 1
            aside = path.with_name(f"damaged-{path.name}-{number}")
        try:
            move(path, aside)
        except OSError as error:
            problem = f"{path} is damaged and cannot be moved aside: {error.strerror}"
    problem, name = world.broadcast_json([problem, aside.name])
    if problem:
        raise SaveError(problem)
    return str(name)


def verify_together(path: Path, world: World) -> str:
    """What is wrong with a checkpoint, "" when nothing is. Collective: every rank reads its share of the bytes.

    ProofError when a rank does not see what rank 0 sees: then nothing is known of the checkpoint.
    """
    problem = digest = ""
    if world.is_main:
        try:
            digest = check_sizes(path)["digest"]
        except UnsoundCheckpoint as error:
            problem = str(error)
    problem, digest = world.broadcast_json([problem, digest])
    if problem:
        return str(problem)
    answers = world.gather_json(_read_share(path, digest, world))
    if unseen := [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]:
        raise ProofError(f"{path} is not what rank 0 sees: {'; '.join(unseen[:8])}. Every machine needs the same output_dir")
    return next((text for _, text in answers if text), "")


def _read_share(path: Path, digest: str, world: World) -> tuple[str, str]:
    """What this rank does not see of the checkpoint whose manifest has this digest, and what is wrong with what it read."""
    try:
        manifest = check_sizes(path)
    except UnsoundCheckpoint as error:
        return str(error), ""
    if manifest["digest"] != digest:
        return "another manifest", ""
    files = manifest["files"]
    names = shares({name: facts["size"] for name, facts in files.items()}, world.size)[world.rank]
    total = sum(files[name]["size"] for name in names)
    hidden = not world.is_main or total < SHOWN_BYTES
    with tqdm(desc=f"verify {path.name}", total=total, unit="B", unit_scale=True, disable=hidden) as bar:
        for name in names:
            if problem := changed(path, files, [name]):
                return "", problem
            bar.update(files[name]["size"])
    return "", ""


def shares(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Names in `count` lists of about as many bytes each; the same on every rank."""
    found: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        found[rank].append(name)
        loads[rank] += sizes[name] + 1
    return found
