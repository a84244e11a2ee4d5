"""The trackers of a start: those that [log] names, on rank 0, over all stages."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from data.dataset import MultimodalDataset
from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.errors import StopRequested
from trainer.machine.json_lines import read_lines
from trainer.runfile.schema import to_tables
from trainer.runfile.toml_files import to_toml
from trainer.state import AnswerRow
from trainer.trackers.background import BackgroundTracker, Tracker
from trainer.trackers.shown_answers import AnswerPictures
from trainer.trackers.tensorboard_files import FOLDER, TensorBoardFiles
from trainer.trackers.wandb_run import WandbOptions, WandbRun

RUN_ID = re.compile(r"[a-z0-9]{8}")
CLOSE_SECONDS, FAILED_SECONDS = 15.0, 2.0
"""Seconds that trackers get at the end of a run, and of one that failed: whoever waits for its exit code waits for them."""


class Trackers:
    """All trackers of a run; none on ranks other than 0. Only `open_trackers` is collective."""

    def __init__(self, members: tuple[BackgroundTracker, ...] = (), ids: Mapping[str, str] | None = None) -> None:
        self.members, self.ids = members, dict(ids or {})  # ids: what a checkpoint keeps, the same on all ranks
        self._pictures = AnswerPictures()

    @property
    def text(self) -> str:
        """Return where the numbers go, for people; "" without a tracker."""
        return "; ".join(member.name for member in self.members)

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Pass the finite numbers among `values` on to every tracker, without waiting."""
        if self.members:
            numbers = numbers_of(values)
            for member in self.members:
                member.log(step, numbers)

    def show(self, step: int, answers: Sequence[AnswerRow], dataset: MultimodalDataset) -> None:
        """Pass the first of the `answers` to records of `dataset` on to every tracker, with their pictures."""
        if self.members and answers:
            shown = self._pictures.rows(answers, dataset)
            for member in self.members:
                member.show(step, shown)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the trackers take what waits for them, for `seconds` each at most."""
        for member in self.members:
            member.close(seconds)


@contextmanager
def tracked(root: RunConfig, world: World, first_step: int, saved: object = None) -> Iterator[Trackers]:
    """Open the trackers for the duration of the `with`; see `open_trackers`. One that does not end is left behind."""
    trackers = open_trackers(root, world, first_step, saved)
    try:
        yield trackers
    except BaseException as error:
        trackers.close(CLOSE_SECONDS if isinstance(error, StopRequested) else FAILED_SECONDS)
        raise
    trackers.close()


def numbers_of(values: Mapping[str, object]) -> dict[str, float]:
    """Return the finite numbers of a line of metrics.jsonl, without its step."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and key != "step"}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def open_trackers(root: RunConfig, world: World, first_step: int, saved: object = None) -> Trackers:
    """Open what [log] names, behind `first_step` completed steps of the run. Collective where it names wandb.

    `saved`: the ids that the resumed checkpoint keeps. Raises `ConfigError` on rank 0 where a package is not installed.
    """
    ids = _ids(root, world, saved if first_step else None)
    wandb, needed = root.log.wandb, {"tensorboard": "log.tensorboard = true"} if root.log.tensorboard else {}
    if wandb.project:
        needed["wandb"] = f"log.wandb.project = {wandb.project!r}"
    if not world.is_main or not needed:
        return Trackers(ids=ids)
    for package, setting in needed.items():
        if find_spec(package) is None:
            raise ConfigError(
                f"{setting} needs {package}, which is not installed: pip install -e '.[track]', or remove the setting"
            )
    folder, members = Path(root.output_dir), list[BackgroundTracker]()
    rows = read_lines(folder / "metrics.jsonl", {"step": int})[0]
    earlier = [(row["step"], numbers_of(row)) for row in rows if first_step and row["step"] <= first_step]
    if root.log.tensorboard:
        opener: Callable[[], Tracker] = partial(TensorBoardFiles, folder, first_step, to_toml(to_tables(root)))
        unseen = () if (folder / FOLDER).is_dir() else earlier
        members.append(BackgroundTracker(f"tensorboard in {folder / FOLDER}", opener, unseen))
    if wandb.project:
        is_same = isinstance(saved, dict) and saved.get("wandb") == ids["wandb"]
        last = max((row["step"] for row in rows), default=-1) if is_same else -1
        opener = partial(WandbRun, WandbOptions(wandb, str(folder), ids["wandb"], to_tables(root), last))
        offline = f", offline in {folder / 'wandb'}" if wandb.mode == "offline" else ""
        where = f"wandb, project {wandb.project}, run {ids['wandb']}{offline}"
        members.append(BackgroundTracker(where, opener, () if is_same else earlier))
    return Trackers(tuple(members), ids)


def _ids(root: RunConfig, world: World, saved: object) -> dict[str, str]:
    """Return the id of the run in wandb: that of the checkpoint, or a new one. Collective where [log] names wandb."""
    if not root.log.wandb.project:
        return {}
    found = saved.get("wandb") if isinstance(saved, dict) else None
    known = isinstance(found, str) and RUN_ID.fullmatch(found)
    return {"wandb": str(world.broadcast_json(found if known else secrets.token_hex(4)))}
