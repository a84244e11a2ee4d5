"""Trackers get what metrics.jsonl has, once per step over all resumes, and never stop or slow training, whatever they do."""

from __future__ import annotations

import html
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.errors import ConfigError
from tests.support.loop import lines_of
from tests.support.runs import config_of, start_alone
from tests.support.trainable import ALONE
from trainer.metrics import MetricsLog
from trainer.trackers import background
from trainer.trackers.background import BackgroundTracker
from trainer.trackers.open_trackers import Trackers, open_trackers
from trainer.trackers.shown_answers import ShownAnswer

needs_tensorboard = pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed: the extra `track`")
needs_wandb = pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed: the extra `track`")


class Recorder:
    """A tracker that keeps what it gets, and does `act` at every line."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.act, self.lines, self.is_closed = act, list[tuple[int, dict[str, float]]](), False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.act()
        self.lines.append((step, dict(values)))

    def show(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        raise AssertionError("no answers are shown here")

    def close(self) -> None:
        self.is_closed = True


def test_a_tracker_gets_every_finite_number_of_the_log_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    earlier = [(1, {"train/loss": 3.0})]
    trackers = Trackers((BackgroundTracker("one", lambda: recorder, earlier),))
    log = MetricsLog(tmp_path, 0, ALONE, "align", trackers)
    log.write(2, {"train/loss": 2.0, "train/grad_norm": float("nan"), "train/tokens": 7})
    log.write(2, {"val/loss": 2.5})
    log.write(4, {"train/loss": float("inf"), "mem/peak_gib": 0.5})
    trackers.close()
    assert recorder.lines == [
        (1, {"train/loss": 3.0}),
        (2, {"train/loss": 2.0, "train/tokens": 7}),
        (2, {"val/loss": 2.5}),
        (4, {"mem/peak_gib": 0.5}),
    ]
    assert recorder.is_closed


def fails() -> object:
    raise SystemExit("no\nkey")


def test_a_tracker_that_fails_is_told_once_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    other = Recorder()
    trackers = Trackers((BackgroundTracker("bad", lambda: Recorder(fails)), BackgroundTracker("good", lambda: other)))
    for step in range(50):
        trackers.log(step, {"train/loss": 1.0})
    trackers.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said == ["tracker   bad is left out from here on, training goes on: SystemExit: no key"]
    assert len(other.lines) == 50


@pytest.mark.parametrize("where", ["opening", "logging"])
def test_a_tracker_that_hangs_costs_nothing_and_is_told_once(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MOST_WAITING", 20)
    forever = threading.Event()

    def open_tracker() -> Recorder:
        if where == "opening":
            forever.wait()
        return Recorder(forever.wait)

    tracker = BackgroundTracker("slow", open_tracker)
    started = time.process_time()
    for step in range(1000):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close(0.1)
    assert time.process_time() - started < 0.5
    said = capsys.readouterr().out.splitlines()
    assert said == ["tracker   slow is left out from here on, training goes on: it hangs: 20 lines wait for it"]
    forever.set()


def test_a_tracker_that_does_not_end_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    forever = threading.Event()
    tracker = BackgroundTracker("slow", lambda: Recorder(forever.wait))
    tracker.log(1, {"train/loss": 1.0})
    tracker.close(0.05)
    assert "slow is left out from here on, training goes on: it was not done 0.05 s after the run" in capsys.readouterr().out
    forever.set()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"tensorboard": 1}, "log.tensorboard = 1 is not true or false"),
        ({"wandb": "mine"}, "log.wandb = 'mine' is not a table"),
        (
            {"wandb": {"project": "p", "mode": "onlin"}},
            "log.wandb.mode = 'onlin' is not 'online' | 'offline'; did you mean 'online'?",
        ),
        ({"wandb": {"mode": "offline"}}, "log.wandb.mode = 'offline' has no effect: log.wandb.project, .* is not named"),
        ({"wandb": {"name": "a"}}, "log.wandb.name = 'a' has no effect"),
        ({"wandb": {"projekt": "a"}}, "log.wandb.projekt is not a setting; did you mean 'log.wandb.project'?"),
    ],
)
def test_wrong_settings_are_named(parts: Path, log: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("|", r"\|").replace("?", r"\?")):
        config_of(parts, log=log)


def test_a_stage_cannot_have_a_tracker_of_its_own(parts: Path) -> None:
    with pytest.raises(ConfigError, match=r"log.tensorboard belongs to the whole run"):
        config_of(parts, stage=[{"name": "a"}, {"name": "b", "log": {"tensorboard": True}}])


@pytest.mark.parametrize(("package", "log"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": {"project": "p"}})])
def test_a_package_that_is_missing_is_named_before_anything_is_read(
    parts: Path, monkeypatch: pytest.MonkeyPatch, package: str, log: dict[str, Any]
) -> None:
    monkeypatch.setattr("trainer.trackers.open_trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"log.* needs {package}, which is not installed: pip install -e '.\[track\]'"):
        open_trackers(config_of(parts, log=log), ALONE, 0)


def two_starts(parts: Path, run: Path, log: dict[str, Any]) -> None:
    """Six steps, then from step 4 again up to step 8."""
    sections: dict[str, Any] = {
        "log": {"every": 1, **log},
        "data": {"validation": [{"path": str(parts / "train.json"), "media_root": str(parts / "images")}]},
        "validation": {"every": 3, "max_samples": 4, "metrics": ["contains"], "max_new_tokens": 4},
    }
    first = start_alone(parts, run, {**sections, "train": {"max_steps": 6}})
    assert first.code == 0 and f"tracked   {'tensorboard in' if 'tensorboard' in log else 'wandb, project'} " in first.said
    back = {"every": 2, "resume": str(run / "checkpoint-4")}
    assert start_alone(parts, run, {**sections, "train": {"max_steps": 8}, "checkpoint": back}).code == 0


@needs_tensorboard
def test_tensorboards_reader_finds_the_log_and_no_step_twice(parts: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_starts(parts, tmp_path / "run", {"tensorboard": True})
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    lines = lines_of(tmp_path / "run")
    for key in {key for line in lines for key in line} - {"step"}:
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert [event.step for event in found.Scalars(key)] == [step for step, _ in expected], key
        assert [event.value for event in found.Scalars(key)] == pytest.approx([value for _, value in expected], rel=1e-6)
    text = found.Tensors("run.toml/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "max_steps = 8" in text and "[optim]" in text
    answers = answers_of(tmp_path / "run")
    tables = found.Tensors("validation answers/text_summary")
    # Its reader drops scalars and pictures of steps that are run again; of texts it keeps both.
    assert sorted({event.step for event in tables}) == sorted({row["step"] for row in answers}) == [3, 6, 8]
    lines = tables[-1].tensor_proto.string_val[0].decode().splitlines()
    last = [row for row in answers if row["step"] == 8]
    assert len(lines) == 2 + len(last) and len(last) == 4
    for line, row in zip(lines[2:], last):
        cells = [html.unescape(cell.strip()) for cell in line.strip("|").split(" | ")]
        assert cells == [" ".join(row[key].split()) for key in ("source", "id", "prompt", "expected", "answer")]
    records = json.loads((parts / "train.json").read_text())
    with_picture = [row for row in last if records[row["sample"]].get("image")]
    assert with_picture and len(found.Tags()["images"]) == len(with_picture)
    for row in with_picture:
        (drawn,) = found.Images(f"validation pictures/{row['source']} {row['id']}")[-1:]
        names = records[row["sample"]]["image"]
        with Image.open(parts / "images" / (names if isinstance(names, str) else names[0])) as stored:
            assert same_picture(Image.open(io.BytesIO(drawn.encoded_image_string)), stored.convert("RGB"))


def same_picture(found: Image.Image, stored: Image.Image) -> bool:
    """Whether a picture of at most 192 pixels is what is stored, which is smaller."""
    return found.size == stored.size and found.tobytes() == stored.tobytes()


def answers_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]


@needs_wandb
def test_wandb_offline_is_one_run_with_every_step_once(parts: Path, tmp_path: Path) -> None:
    two_starts(parts, tmp_path / "run", {"wandb": {"project": "p", "name": "mine", "mode": "offline"}})
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1
    kept = json.loads((tmp_path / "run" / "checkpoint-8" / "state.json").read_text())["trackers"]["wandb"]
    assert files[0].stem == f"run-{kept}"
    rows: dict[int, dict[str, float]] = {}
    for run, history in map(history_of, files):
        assert (run.project, run.display_name, run.run_id) == ("p", "mine", kept)
        assert not rows.keys() & history.keys()
        rows |= history
    lines = lines_of(tmp_path / "run")
    assert sorted(rows) == list(range(1, 9))
    tables = {step: row["val/answers_table/nrows"] for step, row in rows.items() if "val/answers_table/nrows" in row}
    assert tables == {3: 4, 6: 4, 8: 4}
    (file,) = (tmp_path / "run" / "wandb").rglob("answers_table_8_*.table.json")
    written = json.loads(file.read_text())
    assert written["columns"] == ["source", "id", "picture", "question", "expected", "answer"]
    for values, answer in zip(written["data"], [row for row in answers_of(tmp_path / "run") if row["step"] == 8]):
        assert values[:2] + values[3:] == [answer[key] for key in ("source", "id", "prompt", "expected", "answer")]
    for line in lines:
        if line["step"] <= 4 or line["step"] > 6:  # steps 5 and 6 are those of the first start
            for key in line.keys() - {"step"}:
                assert rows[line["step"]][key] == pytest.approx(line[key], rel=1e-12)


def history_of(file: Path) -> tuple[Any, dict[int, dict[str, float]]]:
    """The run of a folder that wandb wrote offline, and its logged values by step."""
    from wandb.proto import wandb_internal_pb2

    run, rows = None, {}
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows[int(values["_step"])] = values
    return run, rows


def records_of(data: bytes, block: int = 2**15) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind wandb's header of 7 bytes."""
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little for a header: padding
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]  # 1 whole, 2 first, 3 middle, 4 last
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
