"""A limit on open files is raised, or told in one line before it ends a run."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from model.errors import ConfigError
from tests.support.parcel import files_up_to, open_files
from tests.support.runs import tables
from trainer.errors import CONFIG
from trainer.machine.open_files import check_limit, raise_limit
from trainer.runfile.toml_files import to_toml
from trainer.supervise import report_failure

ROOT = Path(__file__).parents[2]


def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with files_up_to(open_files() + 20):
        raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_what_workers_need_is_asked_for_before_they_start(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    sources = (SourceConfig(str(tmp_path / "a.jsonl")),)
    with files_up_to(open_files() + 60):
        check_limit(DataConfig(workers=4, sources=sources))
        with pytest.raises(ConfigError, match=r"training takes about \d+ .* data.workers = 40\): raise the limit .`ulimit -n`"):
            check_limit(DataConfig(workers=40, sources=sources))
        with pytest.raises(ConfigError):  # those of validation are there at the same time
            check_limit(DataConfig(workers=7, sources=sources, validation=sources))


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files", "x"), RuntimeError("socket: Too many open files")])
def test_an_error_of_too_many_files_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    assert report_failure(error, tmp_path, None, 0) == CONFIG
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ulimit -n" in said and json.loads((tmp_path / "exit.json").read_text())["code"] == CONFIG


@pytest.mark.long
@pytest.mark.parametrize("limit", [24, 16, 12])
def test_a_run_under_a_tiny_limit_ends_with_one_line(parts: Path, tmp_path: Path, limit: int) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(tables(parts, output_dir=str(tmp_path / "run"), data={"workers": 4})))
    command = [sys.executable, "-m", "trainer.main", "--cfg", str(path)]

    def narrow() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=narrow, timeout=100, check=False)
    assert found.returncode == CONFIG and len(found.stderr) < 1000
    assert f"this process may have {limit} " in found.stderr and "ulimit -n" in found.stderr
