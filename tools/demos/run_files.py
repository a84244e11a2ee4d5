"""Run files of demos, benches and checks, which are TOML files, and the two questions of the digit demo."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from string import Template

QUESTIONS = {"digit": "Which digit is this?", "parity": "Is this digit odd or even?"}


def write_run_file(folder: Path, name: str, package: str = __package__, source: str = "", **values: object) -> Path:
    """Write folder/NAME.toml, `folder` as it was given in place of every @, and return its path.

    It is made of SOURCE.toml of a package, by default NAME.toml of the demos, with the name and `values` in place of $words.
    """
    text = files(package).joinpath(f"{source or name}.toml").read_text(encoding="utf-8")
    # A JSON string of a path is a TOML string as well.
    text = text.replace("@", json.dumps(folder.as_posix(), ensure_ascii=False)[1:-1])
    path = folder / f"{name}.toml"
    path.write_text(Template(text).substitute(values, name=name) if source else text, encoding="utf-8")
    return path
