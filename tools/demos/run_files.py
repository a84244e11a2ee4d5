"""The demos' run files, TOML files beside this one, and the two questions of the digit demo."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

QUESTIONS = {"digit": "Which digit is this?", "parity": "Is this digit odd or even?"}


def write_run_file(folder: Path, name: str) -> None:
    """Write folder/NAME.toml, `folder` as it was given in place of every @."""
    text = files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    # A JSON string of a path is a TOML string as well.
    text = text.replace("@", json.dumps(folder.as_posix(), ensure_ascii=False)[1:-1])
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
