"""TensorBoard's event files of a run, in RUN/tensorboard: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.trackers.shown_answers import ShownAnswer

FOLDER = "tensorboard"
FLUSH_SECONDS = 15
MARKS = set("|<>&`*_[]()!#\\~")
"""Letters that Markdown or HTML would take for marks."""
COLUMNS = ["source", "id", "question", "expected", "answer"]


class TensorBoardFiles:
    """Writer of event files through torch's SummaryWriter. Readers drop what earlier starts wrote of steps that are run again."""

    def __init__(self, run_folder: Path, first_step: int, settings: str) -> None:
        """Begin a file behind `first_step` completed steps, and show the run file `settings`."""
        from torch.utils.tensorboard import SummaryWriter

        # A reader purges what is at the purge step or later: on a fresh start everything.
        purge_step = first_step + 1 if first_step else 0
        self.writer = SummaryWriter(str(run_folder / FOLDER), purge_step=purge_step, flush_secs=FLUSH_SECONDS)
        indented = "".join(f"    {line}\n" for line in settings.splitlines())  # Markdown's form of text as it is
        self.writer.add_text("run.toml", indented, first_step)
        self.writer.flush()
        self._drawn: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each value, all in one event: an event for each would cost four times as much."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer._get_file_writer().add_summary(Summary(value=scalars), step)

    def show(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        """Add a table of the answers, and each picture once."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        cells = [
            [_cell(value) for value in (a.row["source"], a.row["id"], a.row["prompt"], a.row["expected"], a.row["answer"])]
            for a in answers
        ]
        lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
        self.writer.add_text("validation answers", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        pictures = []
        for answer in answers:
            tag = f"validation pictures/{answer.row['source']} {answer.row['id']}"
            if answer.picture and tag not in self._drawn:
                self._drawn.add(tag)
                width, height = answer.picture.size
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=answer.picture.png)
                pictures.append(Summary.Value(tag=tag, image=image))
        self.writer._get_file_writer().add_summary(Summary(value=pictures), step)

    def close(self) -> None:
        self.writer.close()


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table, as it was said: no mark-up of its own."""
    return "".join(f"&#{ord(letter)};" if letter in MARKS else letter for letter in " ".join(text.split()))
