"""The benchmark of the whole compares contenders that do the same work: equal losses at every step, and a table that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from tools import bench_train
from tools.bench_train import Bench, check_losses, table_lines, useful_tokens
from tools.benches.contender import CONTENDERS, RANDOM
from tools.benches.meter import PHASES, Figures, StepMeter
from tools.benches.ours import run_ours
from tools.benches.peers import PeerRun, run_bare
from tools.benches.prepare import prepare
from trainer.errors import ProofError

STEPS = 2


class Ended(Exception):
    """Raised where a contender's process would end."""


class Recorder(StepMeter):
    def _finish(self) -> NoReturn:
        raise Ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    shares = prepare(folder, "tiny", STEPS, "float32")
    assert 0.1 < shares["random"] < shares["grouped"] <= 1
    return folder


def test_ours_packed_and_a_bare_loop_find_the_same_losses(folder: Path) -> None:
    bare, ours = Recorder(STEPS), Recorder(STEPS + 2)  # a run has one step more than is measured
    with pytest.raises(Ended):
        run_bare(PeerRun(folder, RANDOM, 4, 1, "cpu", bare))
    with pytest.raises(RuntimeError, match="ended with exit code 0 before its last step"):
        run_ours(str(folder / "packed.toml"), ours)
    losses = [[float(loss) for loss in meter._losses] for meter in (bare, ours)]
    assert len(losses[0]) == STEPS
    assert len(losses[1]) == STEPS + 1
    np.testing.assert_allclose(losses[0], losses[1][:STEPS], rtol=1e-5)
    tokens = json.loads((folder / "random.tokens.json").read_text())
    assert ours.found.slots == tokens[: STEPS + 1]  # nothing is padded, and no token left out
    assert bare.found.slots[0] > tokens[0]
    assert set(ours._spent) == set(PHASES) and all(ours._spent[phase] > 0 for phase in PHASES)


def found(rate: float, slots: int, loss: float) -> Figures:
    return Figures(5.0, 100 / rate, 1.0, dict.fromkeys(PHASES, 0.1), 200.0 / rate, [slots, slots], [loss, loss])


def test_the_table_and_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "random.tokens.json").write_text("[50, 100, 70]")
    bench = Bench(tmp_path, "tiny", 4, STEPS, 2, "cpu")
    runs = {"ours, packed": [found(4, 100, 2.0)] * 2, "Trainer": [found(2, 200, 2.0)] * 2}
    assert useful_tokens(bench, "Trainer") == 100
    head, line, ours, trainer = ([cell.strip() for cell in row.strip("|").split("|")] for row in table_lines(bench, runs))
    assert len(head) == len(line) == len(ours) == len(trainer) == 12
    assert ours[:6] == ["ours, packed", "4", "100", "1.00", "1.00", "50"]
    assert trainer[:8] == ["Trainer", "2", "100", "2.00", "0.50", "100", "0.50", "50.000"]
    assert check_losses(bench, runs) == {RANDOM: 0.0}
    with pytest.raises(ProofError, match="losses of the same steps differ"):
        check_losses(bench, {**runs, "TRL": [found(2, 200, 2.1)]})


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "find_spec", lambda name: None)
    assert {name for name in CONTENDERS if bench_train.not_installed(name)} == {name for name in CONTENDERS if name.startswith("T")}
    assert bench_train.not_installed("TRL") == ["trl", "datasets"]


@pytest.mark.long
def test_every_contender_that_is_installed_does_the_same_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_train.main(["--size", "tiny", "--steps", "3", "--rounds", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("the loss of every step equal within") == 2
    for name in ("ours, packed", "ours, padded", "bare loop", "Trainer", "Trainer, group_by_length", "TRL"):
        assert f"| {name} |" in said
