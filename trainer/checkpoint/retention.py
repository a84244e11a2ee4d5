"""Retention of checkpoints: which ones a run folder holds and are verified, which one to resume from, which may be removed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from model.card import NAME as CARD
from model.files.manifest import UnsoundCheckpoint, changed, check_sizes
from model.files.untrusted import Json
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError
from trainer.machine.atomic_files import move, move_aside, places, remove_folder

PREFIX = "checkpoint-"
STATE = "state.json"
SHOWN_BYTES = 1 << 30
"""Size from which on a progress bar shows the verification of a checkpoint."""


def prune(folder: Path, keep: int, written: Path) -> None:
    """Remove sound checkpoints except the newest `keep`, the one just `written`, the best, and those that a run or a final/ needs.

    Unsound checkpoints are not counted and stay for the next start to move aside: so the last sound one is never removed. Raises
    OSError when one cannot be removed.
    """
    sound = [path for path in reversed(checkpoints(folder)) if is_whole(path)]
    kept = {written, *sound[:keep]}
    if doomed := [path for path in sound if path not in kept]:
        best = _json(written / STATE).get("best")
        needed = bases(folder, written)
        if isinstance(best, dict) and isinstance(best.get("step"), int):
            needed |= {(folder / f"{PREFIX}{best['step']}").resolve()}
        for path in reversed(doomed):  # oldest first: if a removal fails, the newest are left
            if path.resolve() not in needed:
                remove_folder(path)


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint is sound, judged by names and sizes of its files alone."""
    try:
        check_sizes(path)
        return True
    except UnsoundCheckpoint:
        return False


def bases(folder: Path, written: Path) -> frozenset[Path]:
    """Return the checkpoints of `folder` that the run starts from, or that a final/ in it needs, directly or through another one.

    The settings name what the run starts from: model.init_from, checkpoint.resume or a path of a part. They are stored in the state
    of `written`. A final/ names what it needs in its card.
    """
    named = list(_strings(_json(written / STATE).get("config")))
    named += [text for place in places(folder) for name in ("final", "best") for text in _origins(place / name)]
    found: set[Path] = set()
    while named:
        path = checkpoint_of(folder, named.pop())
        if path is not None and path not in found:
            found.add(path)
            named += _origins(path)
    return frozenset(found)


def checkpoint_of(folder: Path, text: str) -> Path | None:
    """Return the checkpoint of `folder` that a path leads to or into; None when it leads elsewhere."""
    if PREFIX not in text or "\0" in text:
        return None
    path, top = Path(text).resolve(), folder.resolve()
    return next((p for p in (path, *path.parents) if p.parent == top and p.name.startswith(PREFIX)), None)


def _origins(folder: Path) -> list[str]:
    """Return all strings in the model table of the card in `folder`; paths of its bases are among them."""
    return list(_strings(_json(folder / CARD).get("model")))


def _json(path: Path) -> Json:
    """Read a JSON file of this trainer; return {} when it is missing, as in a final/ that does not exist yet.

    Raises OSError when its content is no JSON.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise OSError(errno.EIO, f"cannot be read ({error})", str(path)) from error
    return value if isinstance(value, dict) else {}


def _strings(value: object) -> Iterator[str]:
    """Yield all strings inside a JSON value, but no keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-N, oldest first. Links to such folders are listed; nothing is ever read from a link."""
    names = {p: p.name.removeprefix(PREFIX) for p in folder.glob(f"{PREFIX}*") if p.is_dir()}
    return sorted((p for p, name in names.items() if name.isascii() and name.isdigit()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename the checkpoints beyond `step`, and return a line about each.

    A run that resumes from `step` would mistake them for its own.
    """
    lines = []
    for path in checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            move_aside(path, aside)
            lines.append(f"{path} is beyond step {step}; moved to {aside.name}")
    return lines


def newest_sound(folder: Path, world: World | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose every file is as its manifest says, and lines about newer ones, which are moved aside.

    Collective: rank 0 lists and moves, all ranks read; without a world, this process does all of it. The path is None when there is
    no checkpoint. Raises ProofError when there are checkpoints and none is sound: that is never a fresh start.
    """
    world = world or World(0, 0, 1, torch.device("cpu"))
    damaged: list[str] = []
    names = world.broadcast_json([path.name for path in reversed(checkpoints(folder))] if world.is_main else None)
    for name in names:
        problem = verify_together(folder / name, world)
        if not problem:
            return folder / name, damaged
        damaged.append(f"{problem}; moved to {on_main_rank(world, partial(_move_damaged, folder / name))}")
    if damaged or world.broadcast_json(any(folder.glob(f"damaged-{PREFIX}*"))):
        raise ProofError(
            f"{folder} has checkpoints and none is sound: {'; '.join(damaged) or 'all were moved aside before'}. "
            "Restore one from a copy, use another output_dir, or remove the damaged- folders to start anew"
        )
    return None, []


def _move_damaged(path: Path) -> str:
    """Move a damaged checkpoint aside and return its new name. Raises SaveError when it cannot be moved.

    Checkpoints that were moved aside before are kept: one of them may be all that is left.
    """
    aside, number = path.with_name(f"damaged-{path.name}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"damaged-{path.name}-{number}")
    try:
        move(path, aside)
    except OSError as error:
        raise SaveError(f"{path} is damaged and cannot be moved aside: {error.strerror}") from error
    return aside.name


def verify_together(path: Path, world: World) -> str:
    """Verify a checkpoint: return what is wrong with it, "" when it is sound. Collective: every rank reads its share of the bytes.

    Raises ProofError when a rank does not see the files that rank 0 sees: then nothing is known of the checkpoint.
    """

    def digest_there() -> list[str]:
        try:
            return ["", check_sizes(path)["digest"]]
        except UnsoundCheckpoint as error:
            return [str(error), ""]

    problem, digest = on_main_rank(world, digest_there)
    if problem:
        return problem
    answers = world.gather_json(_read_share(path, digest, world))
    if unseen := [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]:
        raise ProofError(f"{path} is not what rank 0 sees: {'; '.join(unseen[:8])}. Every machine needs the same output_dir")
    return next((text for _, text in answers if text), "")


def _read_share(path: Path, digest: str, world: World) -> tuple[str, str]:
    """Verify this rank's share of the files of a checkpoint; return (what this rank does not see, what is damaged), else "" each.

    `digest`: digest of the manifest that rank 0 sees.
    """
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
    """Distribute file names over `count` lists of about equally many bytes; the result is the same on every rank."""
    found: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        found[rank].append(name)
        loads[rank] += sizes[name] + 1
    return found
