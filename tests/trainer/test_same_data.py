"""A run that goes on notices that its sources hold something else, names the file, and takes it only where that is wished."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from data.fingerprint import changed_files, data_fingerprint
from tests.support.runs import failure_of, start_alone
from tests.support.tiny_data import dataset, grey, talk
from trainer.distributed.world import World
from trainer.errors import SaveError
from trainer.records.same_data import read_data_json, same_data


@pytest.fixture(scope="module")
def begun(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of a run, and the run, which stands after two steps."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copy(parts / "train.json", folder / "train.json")
    shutil.copy(parts / "train.json", folder / "held.json")
    shutil.copytree(parts / "images", folder / "images")
    assert start_alone(parts, folder / "run", sections(folder, 2)).code == 0
    return folder


def sections(folder: Path, steps: int, **data: Any) -> dict[str, Any]:
    root = str(folder / "images")
    sources = {
        "sources": [{"path": str(folder / "train.json"), "media_root": root}],
        "validation": [{"path": str(folder / "held.json"), "media_root": root}],
    }
    return {"data": sources | data, "train": {"max_steps": steps}, "validation": {"every": 9, "max_samples": 2}}


@pytest.fixture(autouse=True)
def restored(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept = tmp_path_factory.mktemp("kept") / "all"
    shutil.copytree(begun, kept)  # with times
    yield
    shutil.rmtree(begun)
    shutil.copytree(kept, begun)


def replaced(path: Path, old: str = "cats on a mat", new: str = "dogs in a bag") -> Path:
    """Equal lengths, new contents."""
    path.write_text(path.read_text().replace(old, new))
    return path


def test_other_contents_are_named(parts: Path, begun: Path) -> None:
    paths = [replaced(begun / "train.json"), replaced(begun / "held.json"), begun / "images" / "1_0.png"]
    Image.new("RGB", (20, 24)).save(paths[2])
    code, reason = failure_of(parts, begun / "run", sections(begun, 3))
    assert code == 2 and "the data of this run has changed since" in reason and "on_change" in reason
    assert all(reason.count(f"- {path} h") == 1 for path in paths)  # the picture is in both splits


def test_contents_are_compared_where_size_and_time_are_equal(tmp_path: Path) -> None:
    data, path = dataset(tmp_path, [talk("Hi", "cats")]), tmp_path / "mix.jsonl"
    before, state = data_fingerprint(data), path.stat()
    replaced(path, "cats", "dogs")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert changed_files(before, data) == [f"{path} holds something else in as many bytes"]


def test_a_copy_with_other_times_is_the_same_data(parts: Path, begun: Path) -> None:
    for path in (begun / "train.json", *(begun / "images").iterdir()):
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    assert start_alone(parts, begun / "run", sections(begun, 3)).code == 0
    assert not (begun / "run" / "data_changes.jsonl").exists()


def test_what_is_wished_for_is_written_down_and_is_what_counts_from_then_on(parts: Path, begun: Path) -> None:
    path = begun / "train.json"
    records = json.loads(path.read_text())
    records[3]["conversations"][1]["value"] += ", and a dog that is much longer than it was before"
    path.write_text(json.dumps(records))
    found = start_alone(parts, begun / "run", sections(begun, 3, on_change="accept"))
    assert found.code == 0 and "from step 2 on the run goes on with other data" in found.said and str(path) in found.said
    rows = [json.loads(line) for line in (begun / "run" / "data_changes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] and str(path) in rows[0]["changes"][0]
    assert start_alone(parts, begun / "run", sections(begun, 4)).code == 0  # nothing has changed since
    path.write_text(json.dumps(records[:-1]))
    code, reason = failure_of(parts, begun / "run", sections(begun, 5, on_change="accept"))
    assert code == 2 and "number or lengths" in reason  # the order of what is left would be another


def test_a_lost_note_is_told(parts: Path, begun: Path) -> None:
    note = begun / "run" / "data.json"
    note.unlink()
    found = start_alone(parts, begun / "run", sections(begun, 3))
    assert found.code == 0 and f"{note} is not there: whether the data changed up to step 2 is unknown" in found.said
    assert json.loads(note.read_text())["splits"].keys() == {"train", "validation"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"plan": ""}', '{"plan": "", "splits": {"train": {"mix": {"files": [[1]], "media": []}}}}']
)
def test_a_damaged_note_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    assert read_data_json(tmp_path / "data.json") is None


@pytest.mark.parametrize("name", ["data.json", "data_changes.jsonl"])
def test_a_folder_in_the_place_of_a_note_cannot_be_written(parts: Path, begun: Path, name: str) -> None:
    (begun / "run" / name).unlink(missing_ok=True)
    (begun / "run" / name).mkdir()
    code, reason = failure_of(parts, begun / "run", sections(begun, 3))
    assert code == 73 and f"{name} is in the way: {name} will be a file" in reason


def test_a_note_that_cannot_be_written_is_no_fault_of_the_settings(tmp_path: Path) -> None:
    train, place = dataset(tmp_path, [talk("Hi", "a")]), SimpleNamespace(folder=tmp_path / "nowhere")
    data = SimpleNamespace(train=train, datasets={"train": train})
    with pytest.raises(SaveError, match=r"nowhere/data.json, .* cannot be written: No such file"):
        same_data(place, data, World(0, 0, 1, torch.device("cpu")), None)  # type: ignore[arg-type]


def test_media_that_are_gone_are_left_to_the_quarantine(tmp_path: Path) -> None:
    grey(tmp_path, 10)
    data = dataset(tmp_path, [talk("<image>", "a", images=["10.png"])])
    before = data_fingerprint(data)
    (tmp_path / "10.png").unlink()
    assert before["mix"]["media"] and changed_files(before, data) == []


def test_media_are_compared_all_over(tmp_path: Path) -> None:
    """Ends that are equal, as those of sounds that begin and end in silence, are not enough."""
    path = tmp_path / grey(tmp_path, 10)
    path.write_bytes(path.read_bytes() + bytes(200_000))
    data = dataset(tmp_path, [talk("<image>", "a", images=["10.png"])])
    before = data_fingerprint(data)
    content = bytearray(path.read_bytes())
    content[100_000] = 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert changed_files(before, data) == [f"{path} holds something else in as many bytes"]


def test_files_that_are_added_or_gone_are_named(tmp_path: Path) -> None:
    grey(tmp_path, 10)
    data = dataset(tmp_path, [talk("<image>", "a", images=["10.png"])])
    before = data_fingerprint(data)
    assert changed_files(before, data) == [] and len(before["mix"]["media"]) == 1
    before["mix"]["files"] = [[str(tmp_path / "other.jsonl"), *before["mix"]["files"][0][1:]]]
    assert changed_files(before, data) == [f"{tmp_path}/mix.jsonl was added", f"{tmp_path}/other.jsonl is gone"]


def test_what_is_too_large_to_be_read_whole_is_in_doubt_when_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.fingerprint.WHOLE_BYTES", 1)
    data = dataset(tmp_path, [talk("Hi", "a")])
    before = data_fingerprint(data)
    assert changed_files(before, data) == []
    os.utime(tmp_path / "mix.jsonl", (1, 1))
    (line,) = changed_files(before, data)
    assert "mix.jsonl was written since" in line
