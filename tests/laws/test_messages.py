"""What goes wrong is told in few words that name it, whatever a file or a setting holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data.records.fields import LINE, LINES, bound_message, shorten
from data.records.record import RecordError, parse
from model.errors import ConfigError
from tests.support.runs import save_parts, save_records, tables
from tools import check_data, cli, inspect_data
from trainer.errors import SaveError
from trainer.faults import exit_report
from trainer.machine.run_folder import FILES, FOLDERS, check_names
from trainer.main import main, run
from trainer.runfile.load import load_config, parse_config
from trainer.runfile.toml_files import to_toml, without_dashes

LONG = "x" * 100_000


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    save_records(folder, 9)
    return folder


def test_a_message_says_how_much_it_leaves_out() -> None:
    assert shorten("abc", 3) == "abc" and shorten("abcd", 3) == "abc... (4 characters)"
    assert bound_message("one\ntwo") == "one\ntwo"
    assert bound_message(LONG) == LONG[:LINE] + "... (100000 characters)"
    assert bound_message("a\n" * 1000).count("\n") == LINES and bound_message("a\n" * 1000).endswith("... and 801 more lines")


RECORDS: dict[str, dict[str, Any]] = {
    "id": {"id": LONG, "image": "gone.png"},
    "a field": {"id": "r", LONG: 1, "image": LONG},
    "a role": {"id": "r", "conversations": [{"from": LONG, "value": "q"}]},
    "a path": {"id": "r", "image": "file:" + LONG},
    "a kind of part": {"id": "r", "messages": [{"role": "user", "content": [{"type": LONG}]}]},
    "a set": {"id": "r", "set": LONG, "image": "a.png"},
    "a turn": {"id": "r", "inserted_id": 10**4000},
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_is_named_in_one_short_line(parts: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    talk = {"conversations": [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "a"}]}
    records = [*json.loads((parts / "train.json").read_text()), {**talk, **RECORDS[what]}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, records)))
    described = tables(parts, data={"sources": [{"path": str(tmp_path / "long.jsonl"), "media_root": str(parts / "images")}]})
    (tmp_path / "run.toml").write_text(to_toml({**described, "output_dir": str(tmp_path / "run")}))
    assert check_data.main(["--cfg", str(tmp_path / "run.toml"), "--workers", "1"]) in (0, 1, 65)
    assert inspect_data.main(["--cfg", str(tmp_path / "run.toml"), "--num", "99"]) in (0, 65)
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "long.jsonl:10" in line]
    assert lines and max(map(len, lines)) < 3 * LINE
    try:
        parse(records[-1], "long.jsonl:10")
    except RecordError as error:
        assert len(str(error)) < 2 * LINE


def test_every_error_is_bounded_at_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ConfigError(LONG)

    assert cli.run_command("tool", fails) == 2
    exit_report.write_exit_report(tmp_path, exit_report.RunEnd(2, LONG, None, 0))
    assert len(capsys.readouterr().err) < 3 * LINE
    assert len(json.loads((tmp_path / "exit.json").read_text())["reason"]) < 2 * LINE


def test_names_that_file_names_are_made_of_are_bounded(parts: Path, tmp_path: Path) -> None:
    source = {"path": str(parts / "train.json"), "name": "n" * 300}
    for sections in ({"sources": [source]}, {"validation": [source]}):
        with pytest.raises(ConfigError, match=r"name = 'n+\.\.\. \(302 characters\) has more than 100 characters"):
            parse_config(tables(parts, data=sections), "test")
    with pytest.raises(ConfigError, match="stage 1: name has 300 characters, more than 100"):
        parse_config({**tables(parts), "stage": [{"name": "n" * 300}, {"name": "b"}]}, "test")
    long = tmp_path / f"{'é' * 120}.json"  # 245 bytes: the index beside it has a name of its own
    long.write_text((parts / "train.json").read_text())
    data = {"sources": [{"path": str(long), "media_root": str(parts / "images")}]}
    described = tables(parts, data=data, train={"max_steps": 1}, output_dir=str(tmp_path / "run"))
    assert run(parse_config(described, "test")) == 0
    # Everything that a run makes is known by its name.
    made = {path.name: path.is_dir() for path in (tmp_path / "run").iterdir() if not path.name.startswith("checkpoint-")}
    assert {name for name, is_folder in made.items() if is_folder} <= {*FOLDERS}
    assert {name for name, is_folder in made.items() if not is_folder} <= {*FILES}


def test_what_stands_in_the_way_is_named(parts: Path, tmp_path: Path) -> None:
    for i, name in enumerate((*FOLDERS, "checkpoint-3", "stages/01-a", *FILES)):
        folder = tmp_path / str(i)
        path = folder / name
        path.parent.mkdir(parents=True)
        check_names(folder)
        path.mkdir() if name in FILES else path.write_text("")
        with pytest.raises(SaveError, match=f"{path.name} is in the way"):
            check_names(folder)
    (tmp_path / "link").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "link" / "index")
    with pytest.raises(SaveError, match="index is in the way"):
        check_names(tmp_path / "link")


@pytest.mark.parametrize(("name", "is_folder"), [("index", False), ("metrics.jsonl", True), ("exit.json", True), (".lock", True)])
def test_it_exits_with_73(parts: Path, tmp_path: Path, name: str, is_folder: bool, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / name
    path.mkdir(parents=True) if is_folder else (path.parent.mkdir(), path.write_text(""))
    (tmp_path / "run.toml").write_text(to_toml({**tables(parts), "output_dir": str(tmp_path / "run")}))
    assert main(["--cfg", str(tmp_path / "run.toml")]) == 73
    said = capfd.readouterr().err
    assert str(path) in said and "Traceback" not in said


def test_settings_may_be_written_as_options(parts: Path, tmp_path: Path) -> None:
    words = ["--cfg", "run.toml", "--train.max_steps=2", "data.workers=0", "--seed=3", "--data.sources.0.weight=2.0", "--stage=a.b"]
    assert without_dashes(words) == [
        *("--cfg", "run.toml", "train.max_steps=2", "data.workers=0", "seed=3", "data.sources.0.weight=2.0", "--stage=a.b"),
    ]
    (tmp_path / "run.toml").write_text(to_toml(tables(parts)))
    found = load_config(str(tmp_path / "run.toml"), without_dashes(["--train.max_steps=2"]))
    assert found.train.max_steps == 2
    assert check_data.main(["--cfg", str(tmp_path / "run.toml"), f"--output_dir={tmp_path / 'other'}"]) == 0
    assert (tmp_path / "other").is_dir()


@pytest.mark.parametrize("words", [["--train.max_steps", "2"], ["--train.max_step=2"]])
def test_an_option_that_is_no_setting_is_an_error_of_ours(
    parts: Path, tmp_path: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(to_toml({**tables(parts), "output_dir": str(tmp_path / "run")}))
    assert main(["--cfg", str(tmp_path / "run.toml"), *words]) == 2
    said = capfd.readouterr().err
    assert "write section.key=value" in said or "did you mean 'train.max_steps'" in said
