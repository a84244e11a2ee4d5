"""A run in wandb. It keeps its id over all resumes; offline it is a folder below RUN/wandb, for `wandb sync`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.files.untrusted import Json
from trainer.config import WandbConfig
from trainer.trackers.shown_answers import ShownAnswer

PROMPT_SECONDS = 0.1
"""A key that is missing is an error at once: nobody sits in front of a run to type one in."""


@dataclass(frozen=True)
class WandbOptions:
    """Beginning of a run in wandb."""

    config: WandbConfig
    folder: str  # of the run, where wandb makes its own
    run_id: str
    settings: Json  # tables of the run file
    last_step: int  # the last step that an earlier start has logged into the run of this id; -1 without one


class WandbRun:
    """One run in wandb, which takes steps in rising order alone: those that an earlier start has logged are not logged again."""

    def __init__(self, options: WandbOptions) -> None:
        """Begin the run, or go on with it."""
        import wandb

        config = options.config
        self.last_step = options.last_step
        self.run = wandb.init(
            project=config.project,
            name=config.name or None,
            mode=config.mode,
            dir=options.folder,
            id=options.run_id,
            # Offline nothing can be asked about the run; `wandb sync` puts folders of one id together.
            resume="allow" if config.mode == "online" else None,
            config=options.settings,
            settings=wandb.Settings(console="off", silent=True, login_timeout=PROMPT_SECONDS),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step. A validation adds to its step's."""
        if step > self.last_step:
            self.run.log(dict(values), step=step)

    def show(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        """Log a table of the answers with their pictures."""
        if step <= self.last_step:
            return
        import wandb
        from PIL import Image

        table = wandb.Table(columns=["source", "id", "picture", "question", "expected", "answer"])
        for answer in answers:
            picture = wandb.Image(Image.open(io.BytesIO(answer.picture.png), formats=["PNG"])) if answer.picture else None
            row = answer.row
            table.add_data(row["source"], row["id"], picture, row["prompt"], row["expected"], row["answer"])
        self.run.log({"val/answers_table": table}, step=step)

    def close(self) -> None:
        self.run.finish()
