"""The samples of a step as the model saw them, on a page of the inspector: their tokens, what is learned, and their media."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import ConfigError, DataError
from tools.cli import printable_lines
from tools.inspector.wanted import Wanted
from tools.watcher.run_view import RunView

if TYPE_CHECKING:
    from tools.inspector.choose import Opened


class StepPages:
    """Pages of steps. The data of a run are opened when the first of its pages is asked for, and stay open."""

    def __init__(self) -> None:
        self._opened: dict[Path, Opened] = {}
        self._one_at_a_time = threading.Lock()

    def page(self, run: RunView, step: int) -> tuple[str, str]:
        """Return kind and text of an answer: a page of what brought `run` to `step` completed steps, or why there is none."""
        if (place := run.place_of(step)) is None:
            return "text/plain", f"step {step} of {run.folder.name} is not on record\n"
        from model.deferred_imports import import_transformers

        import_transformers()
        from tools.inspector.choose import choose_samples, open_sources, stage_to_inspect
        from tools.inspector.sources_page import sources_page

        try:
            with self._one_at_a_time:
                if place not in self._opened:
                    name = "" if place == run.folder else place.name.partition("-")[2]
                    self._opened[place] = open_sources(stage_to_inspect(None, str(run.folder), [], name))
                wanted = Wanted(None, step=step - 1)
                name, words = run.folder.resolve().name, f"the samples that brought it to {step} completed steps"
                return "text/html", sources_page(name, words, choose_samples(self._opened[place], wanted))[0]
        except (ConfigError, DataError) as error:
            return "text/plain", printable_lines(f"{error}\n")
