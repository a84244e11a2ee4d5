"""One export: what it reads, where it writes, and what it says at its end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from model.card import ModelCard


@dataclass(frozen=True)
class ExportTask:
    """An export under way."""

    source: Path  # a final/ folder or a checkpoint
    folder: Path  # the folder to fill
    out: Path  # the name that `folder` has afterwards
    card: ModelCard  # of `source`
    inside: str = ""  # peft: the kind of folder whose modules the adapter names; "" is the bare language model

    def quoted(self, name: str = "") -> str:
        """Return the later path of a file of the export for a shell."""
        return shlex.quote(str(self.out / name) if name else str(self.out))

    def literal(self, name: str = "") -> str:
        """Return the later path of a file of the export as a Python text."""
        return repr(str(self.out / name) if name else str(self.out))


@dataclass(frozen=True)
class Exported:
    """A finished export, as its last line and its model card describe it."""

    following: str  # the command to type next
    what: str  # one sentence on the folder
    library: str = ""  # library_name of the model card: transformers | peft
    task: str = ""  # pipeline_tag of the model card
    notes: tuple[str, ...] = ()  # what differs from the run, and what was left out


def python_line(code: str) -> str:
    """Return a command line that runs Python `code`, which holds no double quotation mark."""
    return f"python -c {shlex.quote(code)}" if '"' in code or "'" not in code else f'python -c "{code}"'
