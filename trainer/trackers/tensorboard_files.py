"""TensorBoard's event files of a run, in RUN/tensorboard: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDER = "tensorboard"
FLUSH_SECONDS = 15


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

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each value, all in one event: an event for each would cost four times as much."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer._get_file_writer().add_summary(Summary(value=scalars), step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
