"""Laws of files that options of the tools name: one that cannot be written is told before the work, and nothing is touched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from tools import check_data, evaluate, inspect_data, probe, replay, watch
from tools.cli import check_named

TOOLS = Path(evaluate.__file__).parent


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("name", "is_folder", "said"),
    [
        ("file/page.html", False, "Not a directory"),
        ("none/page.html", False, "No such file"),
        ("folder", False, "Is a directory"),
        ("file", True, "Not a directory"),
        ("file/a/b", True, "Not a directory"),
        ("closed/page.html", False, "Permission denied"),
        ("closed", True, "Permission denied"),
        ("closed/a/b", True, "Permission denied"),
    ],
)
def test_what_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_folder: bool, said: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").mkdir()
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and allowed(path, mode))
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=f"^--out '{tmp_path / name}' cannot be written: {said}"):
        check_named("--out", tmp_path / name, is_folder)
    assert listing(tmp_path) == before


def test_what_can_be_written_passes_and_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, is_folder in (("file", False), ("new.html", False), (".", True), ("a/b/c", True)):
        check_named("--out", tmp_path / name, is_folder)
    check_named("--out", None)
    check_named("--out", "", is_folder=True)
    check_named("--out", os.devnull)
    assert listing(tmp_path) == [str(tmp_path / "file")] and (tmp_path / "file").read_text() == "x"


def test_every_command_looks_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run and the model are none: a command that went to work first would say that."""
    none, lost = str(tmp_path / "none"), str(tmp_path / "lost" / "page")
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("")
    for option in ("--page", "--predictions"):
        assert evaluate.main([none, "--data", none, option, lost]) == 2 and lost in capsys.readouterr().err
    commands: list[tuple[Any, list[str]]] = [
        (probe, [none, "--page", lost]),
        (probe, [none, "--json", lost]),
        (replay, [none, "--step", "3", "--json", lost]),
        (inspect_data, ["--cfg", none, "--html", lost]),
        (check_data, ["--cfg", none, "--out", str(tmp_path / "file" / "out")]),
        (check_data, ["--cfg", none, "--write-clean", str(tmp_path / "file" / "out")]),
    ]
    for tool, arguments in commands:
        assert tool.main(arguments) == 2
        assert f"{arguments[-2]} {arguments[-1]!r} cannot be written" in capsys.readouterr().err
    assert listing(tmp_path) == [str(tmp_path / name) for name in ("file", "run")]


def test_every_file_that_is_written_by_name_was_looked_at() -> None:
    assert watch.check_named is check_named
    for path in TOOLS.glob("*.py"):
        text = path.read_text()
        written = set(re.findall(r"write_named\(\s*\"(--[a-z-]+)\"", text))
        assert written <= set(re.findall(r"check_named\(\"(--[a-z-]+)\"", text)), path.name
