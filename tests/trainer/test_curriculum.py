"""`[[stage]]` tables: how they merge, what is refused, all of it at once, and that the resolved file says the same."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ConfigError
from tests.support.config import MINIMAL, VALUES_OF_TOML
from tests.support.runs import merged
from trainer.config import RunConfig
from trainer.runfile.load import load_config, parse_config
from trainer.runfile.schema import flatten_tables, to_tables
from trainer.runfile.stages import list_stages
from trainer.runfile.toml_files import to_toml

FROZEN: dict[str, Any] = {"llm": {"tune": "frozen"}}
SEEING: dict[str, Any] = {"name": "see", "model": FROZEN}
ALL: dict[str, Any] = {"name": "all", "model": {"llm": {"tune": "full"}}}


def parsed(*stages: Any, **changes: Any) -> RunConfig:
    return parse_config(merged(MINIMAL, {**changes, "stage": list(stages)}), "run.toml")


def configs(*stages: Any, **changes: Any) -> list[RunConfig]:
    return [stage.config for stage in list_stages(parsed(*stages, **changes))]


def problems(*stages: Any, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parsed(*stages, **changes)
    first, *lines = str(error.value).split("\n  - ")
    assert first == "run.toml:"
    return lines


def test_tables_merge_and_arrays_replace() -> None:
    other = {"path": "b.json", "name": "b"}
    one, two = configs(
        {**SEEING, "data": {"max_length": 99, "sources": [other]}}, {**ALL, "optim": {"lr": 0.5}}, optim={"eps": 1e-6}
    )
    assert (one.data.max_length, [source.key for source in one.data.sources]) == (99, ["b"])
    assert (two.data.max_length, [source.key for source in two.data.sources]) == (2048, ["a"])
    assert (one.optim.lr, one.optim.eps, two.optim.lr, two.optim.eps) == (2e-5, 1e-6, 0.5, 1e-6)
    assert (one.model.llm.tune, two.model.llm.tune) == ("frozen", "full")


def test_every_stage_starts_from_the_one_before_and_the_first_from_what_is_named() -> None:
    one, two, three = configs(SEEING, ALL, {"name": "last", "model": FROZEN}, model={"init_from": "old/final"})
    assert one.model.init_from == "old/final"
    assert two.model.init_from == "runs/x/stages/01-see/final" and three.model.init_from == "runs/x/stages/02-all/final"


def test_of_settings_that_exclude_each_other_the_stages_own_holds() -> None:
    short = {**SEEING, "train": {"max_steps": 3}, "optim": {"warmup_steps": 2}}
    one, two = configs(short, ALL, train={"epochs": 2.0}, optim={"warmup_ratio": 0.1})
    assert (one.train.epochs, one.train.max_steps, one.optim.warmup_ratio, one.optim.warmup_steps) == (None, 3, None, 2)
    assert (two.train.epochs, two.train.max_steps, two.optim.warmup_ratio, two.optim.warmup_steps) == (2.0, None, 0.1, None)
    both = {**SEEING, "train": {"max_steps": 3, "epochs": 1.0}}
    assert problems(both, ALL) == ["stage see: train.epochs and train.max_steps are both named: name one"]


def test_what_a_stage_inherits_and_has_no_use_for_is_left_out_there() -> None:
    """Rates of parts that are frozen for a while, LoRA of a later stage."""
    adapt = {"name": "adapt", "model": {"llm": {"tune": "lora"}, "vision_projector": {"tune": "frozen"}}}
    one, two = configs(SEEING, adapt, lora={"rank": 8}, model={"llm": {"lr": 0.1}}, optim={"projector_lr": 0.2})
    assert (one.lora.rank, one.model.llm.lr, one.optim.projector_lr) == (64, 0.0, 0.2)
    assert (two.lora.rank, two.model.llm.lr, two.optim.projector_lr) == (8, 0.1, 0.0)


def test_what_no_stage_has_a_use_for_is_an_error_and_so_is_what_a_stage_itself_says_in_vain() -> None:
    assert problems(SEEING, ALL, lora={"rank": 8}) == ["every stage: [lora] has no effect: no part has tune = 'lora'"]
    found = problems(merged(SEEING, {"model": {"llm": {"lr": 0.1}}}), ALL)
    assert found == ["stage see: model.llm.lr = 0.1 has no effect: model.llm.tune = 'frozen'"]


def test_weights_are_read_once_by_the_first_stage_that_has_the_part() -> None:
    one, two = configs(SEEING, ALL, model={"vision_projector": {"path": "p"}})
    assert (one.model.vision_projector.path, two.model.vision_projector.path) == ("p", "")  # type: ignore[union-attr]
    again = merged(ALL, {"model": {"vision_projector": {"path": "p"}}})
    assert problems(SEEING, again) == [
        "stage all: model.vision_projector.path has no effect: the part comes from the stage before it"
    ]
    adapt = {"name": "adapt", "model": {"llm": {"tune": "lora"}}}
    paths = [config.lora.path for config in configs(SEEING, adapt, {**adapt, "name": "more"}, lora={"path": "l"})]
    assert paths == ["", "l", ""]


def test_problems_of_all_stages_come_in_one_message() -> None:
    found = problems(
        merged(SEEING, {"optim": {"lrr": 1}}),
        merged(ALL, {"batch": {"micro_batch_size": 0}, "output_dir": "y", "checkpoint": {"resume": "none"}}),
        {"name": "see", "model": {}},
        {"name": "Not so"},
        seed=-1,
    )
    assert found == [
        "stage 3: name = 'see' is the name of an earlier stage: their folders would be one",
        "stage 4: name = 'Not so' is not made of a-z, 0-9, _ and -: every [[stage]] needs such a name",
        "stage see: optim.lrr is not a setting; did you mean 'optim.lr'?",
        "stage all: output_dir belongs to the whole run: write it above the first [[stage]]",
        "stage all: checkpoint.resume belongs to the whole run: write it above the first [[stage]]",
        "stage all: batch.micro_batch_size = 0 is not positive",
        "stage all: seed = -1 is negative or not finite",
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"vision": {"layer": -3}}, {}, "model.vision.layer = -2, but stage 'see' has -3"),
        ({"vision_projector": {"kind": "linear"}}, {}, "model.vision_projector.kind = 'mlp2x_gelu', but stage 'see' has 'linear'"),
        ({}, {"llm": {"path": "other"}}, "model.llm.path = 'other', but stage 'see' has 'llm'"),
        (
            {"audio": {"path": "w"}, "audio_projector": {"prompts": 4}},
            {"audio": {"path": "w"}, "audio_projector": {"prompts": 0}},
            "model.audio_projector.prompts = 0, but stage 'see' has 4",
        ),
        ({"audio": {"path": "w"}, "audio_projector": {}}, {}, "[model.audio] is missing: stage 'see' has it"),
        (
            {},
            {"audio": {"path": "w"}, "audio_projector": {"tune": "frozen"}},
            "model.audio_projector.tune = 'frozen' without weights",
        ),
    ],
)
def test_a_stage_that_does_not_fit_the_one_before_is_refused(first: Any, second: Any, expected: str) -> None:
    found = problems(merged(SEEING, {"model": first}), merged(ALL, {"model": second}))
    assert any(line.startswith(f"stage all: {expected}") for line in found), found


def test_a_part_may_come_later_and_prompts_too() -> None:
    hearing = {"name": "hear", "model": {**FROZEN, "audio": {"path": "w"}, "audio_projector": {}}}
    prompted = merged(hearing, {"name": "prompts", "model": {"audio_projector": {"tune": "prompts", "prompts": 5}}})
    one, two, three = configs(SEEING, hearing, merged(prompted, {"model": {"vision_projector": {"tune": "frozen"}}}))
    assert (one.model.audio, two.model.audio.path, three.model.audio_projector.prompts) == (None, "w", 5)  # type: ignore[union-attr]


def test_the_resolved_file_says_the_same() -> None:
    stages = (
        {**SEEING, "train": {"max_steps": 3}, "model": {**FROZEN, "vision_projector": {"path": "p", "lr": 0.5}}},
        {"name": "adapt", "model": {"llm": {"tune": "lora", "lr": 0.25}, "vision_projector": {"lr": 0.0}}, "seed": 1},
        {"name": "see-2", "model": FROZEN, "data": {"sources": [{"path": 'b"\n.json', "media_root": {"image": "i"}}]}},
        {**ALL, "data": {"validation": [{"path": "v.json"}]}, "validation": {"every": 3}},
    )
    config = parsed(*stages, lora={"rank": 8}, optim={"projector_lr": 0.1}, train={"epochs": 2.0}, model={"init_from": "old"})
    text = to_toml(to_tables(config))
    again = parse_config(tomllib.loads(text), "again")
    assert again == config and to_toml(to_tables(again)) == text
    assert [stage.config for stage in list_stages(again)] == [stage.config for stage in list_stages(config)]
    assert len(flatten_tables(to_tables(config)["stage"])) < 40  # what is the same is not said again


def test_overrides_reach_stages(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(merged(MINIMAL, {"stage": [SEEING, ALL]})))
    two = list_stages(load_config(str(path), ["stage.1.optim.lr=0.5", "train.max_steps=7"]))[1].config
    assert (two.optim.lr, two.train.max_steps) == (0.5, 7)


NAMES = st.sampled_from(["name", "model", "optim", "train", "stage", "data", "lora"])


@given(st.lists(st.dictionaries(NAMES, VALUES_OF_TOML, max_size=3), max_size=3), st.dictionaries(NAMES, VALUES_OF_TOML, max_size=2))
def test_whatever_is_written_there_is_one_clear_error_or_a_run(stages: list[Any], base: dict[str, Any]) -> None:
    try:
        parse_config(merged(MINIMAL, {**base, "stage": [{"name": "a"}, *stages]}), "fuzz")
    except ConfigError as error:
        assert str(error).startswith("fuzz:\n  - ")
