"""Lengths are exact once the data were checked, and those that a run was first planned by stay with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.check.check_dataset import check_dataset
from data.check.measured_lengths import (
    ESTIMATED,
    EXACT,
    FROZEN,
    PARTLY,
    best_lengths,
    freeze_lengths,
    planned_lengths,
    read_measurements,
    source_identities,
)
from data.config import DataConfig, SourceConfig
from data.dataset import MultimodalDataset, open_dataset
from data.index.sidecar import read_arrays, write_arrays
from data.sample import Sample
from tests.support.ranks import run_ranks
from tests.support.resume import weights
from tests.support.runs import Start, start, start_alone, tables
from tests.support.tiny_data import SPECS, datasets, grey, talk, template
from tools import check_data
from trainer.runfile.toml_files import to_toml


def mixed(folder: Path, **config: Any) -> MultimodalDataset:
    """Two sources: text of many lengths and pictures; several rounds, a broken line, one that is too long."""
    grey(folder, 7)
    texts: list[Any] = [talk("Hi " * (i % 7), "word " * (1 + i % 5), "And?", "So " * i) for i in range(1, 21)]
    seen = [talk("<image>" * (i % 3 + 1), f"{i} cats", images=["7.png"] * (i % 3 + 1)) for i in range(9)]
    return datasets(folder, {"texts": [*texts, "{", talk("word " * 200, "no")], "seen": seen}, **config)


@pytest.mark.parametrize("config", [{}, {"image_fit": "tiles", "max_tiles": 4, "min_tiles": 2}, {"placeholders": "first"}])
def test_checked_lengths_are_those_of_the_samples(tmp_path: Path, config: dict[str, Any]) -> None:
    data = mixed(tmp_path, max_length=64, **config)
    index = tmp_path / "index"
    estimated, kind = best_lengths(data, index)
    assert kind == ESTIMATED and np.array_equal(estimated, data.lengths)
    check_dataset(data, index)
    lengths, kind = best_lengths(data, index)
    items = [data[i] for i in range(len(data))]
    made = [i for i, item in enumerate(items) if isinstance(item, Sample)]
    assert kind == EXACT and lengths.dtype == np.int32 and len(made) == len(data) - 2
    assert [int(lengths[i]) for i in made] == [len(items[i].input_ids) for i in made]  # type: ignore[union-attr]
    assert not np.array_equal(lengths[made], estimated[made])
    assert lengths[20:22].tolist() == estimated[20:22].tolist()  # no sample: the estimate is as good as any
    assert max(len(items[i].input_ids) for i in made) > 60  # type: ignore[union-attr]  # some were cut to whole rounds


def test_what_is_measured_is_known_by_what_it_follows_from(tmp_path: Path) -> None:
    data, index = mixed(tmp_path), tmp_path / "index"
    check_dataset(data, index)
    assert all(found is not None for found in read_measurements(data, index))
    names = source_identities(data)
    assert source_identities(mixed_again(tmp_path)) == names and len(set(names)) == 2
    for changed in (mixed_again(tmp_path, max_length=99), mixed_again(tmp_path, max_images=3)):
        assert not set(source_identities(changed)) & set(names) and best_lengths(changed, index)[1] == ESTIMATED
    with (tmp_path / "seen.jsonl").open("a") as file:
        file.write("\n")
    assert best_lengths(mixed_again(tmp_path), index)[1] == PARTLY


def mixed_again(folder: Path, **config: Any) -> MultimodalDataset:
    """The files as they are, opened with other settings."""
    sources = tuple(SourceConfig(str(folder / f"{name}.jsonl"), media_root=str(folder)) for name in ("texts", "seen"))
    return open_dataset(sources, DataConfig(**config), template(), SPECS, folder / "index")


def test_frozen_lengths_outlive_a_check(tmp_path: Path) -> None:
    data, index = mixed(tmp_path), tmp_path / "index"
    freeze_lengths({"train": data}, tmp_path)
    estimated = data.lengths
    check_dataset(data, index)
    lengths, kind = planned_lengths(data, tmp_path, "train")
    assert kind == ESTIMATED and np.array_equal(lengths, estimated)
    assert planned_lengths(data, tmp_path, "validation")[1] == EXACT  # nothing was frozen for it
    freeze_lengths({"train": data}, tmp_path)  # another first start
    assert planned_lengths(data, tmp_path, "train")[1] == EXACT
    (tmp_path / FROZEN).write_bytes((tmp_path / FROZEN).read_bytes()[:100])  # not ours to trust
    assert planned_lengths(data, tmp_path, "train")[1] == EXACT


def test_the_same_arrays_are_the_same_bytes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5), "b": np.array([], dtype=np.int32)}
    for name in ("one", "two"):
        write_arrays(tmp_path / name, arrays)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_arrays(tmp_path / "one")
    assert found is not None and {name: (v.tolist(), v.dtype) for name, v in found.items()} == {
        name: (v.tolist(), v.dtype) for name, v in arrays.items()
    }
    assert read_arrays(tmp_path / "none") is None


def check(parts: Path, output_dir: Path, sections: dict[str, Any]) -> None:
    """tools.check_data for the run."""
    path = output_dir.parent / f"{output_dir.name}.toml"
    path.write_text(to_toml(tables(parts, **{"output_dir": str(output_dir), **sections})))
    assert check_data.main(["--cfg", str(path), "--workers", "1"]) == 0


def test_a_check_in_the_middle_of_a_run_changes_nothing_of_it(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"data": {"order": "length"}, "train": {"max_steps": 6}, "optim": {"schedule": "constant"}}
    whole = start_alone(parts, tmp_path / "whole", sections)
    first = start_alone(parts, tmp_path / "cut", {**sections, "train": {"max_steps": 3}})
    check(parts, tmp_path / "cut", sections)
    assert "keeps the lengths it was first planned by" in capsys.readouterr().out
    second = start_alone(parts, tmp_path / "cut", sections)
    assert (whole.code, first.code, second.code) == (0, 0, 0)
    assert first.seen + second.seen == whole.seen and weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert "lengths   estimated" in second.said
    # A run that starts after the check is planned by what the check found, which is another plan.
    check(parts, tmp_path / "exact", sections)
    exact = start_alone(parts, tmp_path / "exact", sections)
    assert exact.code == 0 and "lengths   exact, for the whole run" in exact.said
    lengths = [read_arrays(tmp_path / name / FROZEN)["train"] for name in ("whole", "exact")]  # type: ignore[index]
    assert not np.array_equal(*lengths)


def test_a_packed_run_measures_what_nobody_has_checked(parts: Path, tmp_path: Path) -> None:
    sections = {
        "data": {"packing": True, "max_length": 64},
        "batch": {"micro_batch_size": None, "micro_batch_tokens": 64},
        "train": {"max_steps": 2},
    }
    said: list[Start] = run_ranks(start, 2, parts, tmp_path / "run", sections)
    assert [one.code for one in said] == [0, 0]
    assert "measuring the 22 records of train" in said[0].said and "lengths   exact" in said[0].said and said[1].said == ""
    shutil.rmtree(tmp_path / "run" / "index")  # planned is planned, even so
    said = run_ranks(start, 2, parts, tmp_path / "run", {**sections, "train": {"max_steps": 3}})
    assert [one.code for one in said] == [0, 0] and "measuring" not in said[0].said and "lengths   exact" in said[0].said
