"""The selection that a user of the inspector asks for. A module of its own: the command line knows it before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass

from model.media_spec import PLACEHOLDERS

KINDS = (*PLACEHOLDERS, "text")
"""Values of --modality."""


@dataclass(frozen=True)
class Wanted:
    """The selection that a user asks for."""

    num: int | None  # of each source; None: all
    source: str = ""
    kind: str = ""  # image | video | audio | text
    longest: bool = False
    quarantined: bool = False
    spread: bool = False  # evenly over each source, not its first ones
    step: int | None = None

    @property
    def words(self) -> str:
        """Describe the selection in words."""
        if self.step is not None:
            return f"the samples of step {self.step}"
        which = "the longest" if self.longest else "quarantined ones" if self.quarantined else ""
        which = which or ("spread evenly over the file" if self.spread else "the first ones")
        only = {"": "", "text": ", text only"}.get(self.kind, f", with {self.kind}")
        return f"{'all' if self.num is None else f'up to {self.num}'} records of each source{only}: {which}"
