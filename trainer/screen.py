"""Progress of a run on the screen of rank 0: a bar in a terminal; elsewhere, as in a file or a pipe, a line per logged step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tqdm import tqdm

from trainer.scores.text_metrics import METRICS


class Screen:
    """The screen of one stage. Every method but `__init__` is called on every rank, and prints on rank 0 alone."""

    def __init__(self, stage: str, first_step: int, total: int, *, speaks: bool) -> None:
        self.stage, self.first_step, self.total, self.speaks = stage, first_step, total, speaks
        self.started_at = time.perf_counter()
        in_terminal = speaks and sys.stderr.isatty()
        self.bar = tqdm(
            desc=stage or None, total=total, initial=first_step, unit="step", disable=not in_terminal, dynamic_ncols=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.bar.close()

    def stepped(self) -> None:
        self.bar.update()

    def logged(self, done: int, values: Mapping[str, float], lr: float) -> None:
        """Show the metrics of the line that is logged after `done` steps."""
        loss = f"loss {values['train/loss']:.4f},{_preference(values, 'train')}"
        text = f"{loss} lr {lr:.2e}, {values['perf/tokens_per_second']:,.0f} tokens/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            seconds = (time.perf_counter() - self.started_at) / max(1, done - self.first_step) * (self.total - done)
            self.say("step", f"{self._place(done)}, {text}, {tqdm.format_interval(seconds)} left")

    def validated(self, done: int, values: Mapping[str, float], seconds: float) -> None:
        """Show a validation after `done` steps: its loss in all and per source where there are several, and its measures."""
        sources = {key.split("/")[1]: value for key, value in values.items() if key.count("/") == 2 and key.endswith("/loss")}
        each = f" ({', '.join(f'{name} {value:.4f}' for name, value in sources.items())})" if len(sources) > 1 else ""
        loss = values.get("val/loss", math.nan)
        measured = "".join(f", {name} {values[key]:.4g}" for name in METRICS if (key := f"val/{name}") in values)
        prefers = _preference(values, "val").rstrip(",")
        self.say(
            "validated", f"{self._place(done)}, loss {loss:.4f}{each}{',' * bool(prefers)}{prefers}{measured} in {seconds:.1f} s"
        )

    def say(self, word: str, text: str) -> None:
        """Print a line that begins with `word`, above the bar where there is one."""
        if self.speaks:
            tqdm.write(f"{word:<9} {text}")
            sys.stdout.flush()

    def _place(self, done: int) -> str:
        return f"{self.stage} {done} of {self.total}".strip()


def _preference(values: Mapping[str, float], prefix: str) -> str:
    """Return the loss of preferences and how often the chosen answer is preferred, as part of a line; "" where none are learned."""
    if f"{prefix}/preference_loss" not in values:
        return ""
    accuracy = values.get(f"{prefix}/preference_accuracy")
    rate = "" if accuracy is None else f" {accuracy:.0%} right,"
    return f" preference {values[f'{prefix}/preference_loss']:.4f},{rate}"
