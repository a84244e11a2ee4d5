"""run.toml: strict, everything at once, and the resolved file is always accepted again."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ConfigError
from tests.support.config import MINIMAL, VALUES_OF_TOML, problems
from tests.support.runs import merged
from trainer.runfile.load import load_config, parse_config
from trainer.runfile.schema import to_tables
from trainer.runfile.toml_files import to_toml


def test_defaults_are_the_published_ones() -> None:
    config = parse_config(MINIMAL, "x")
    assert (config.seed, config.batch.global_batch_size, config.lora.rank, config.lora.alpha) == (42, 128, 64, 16)
    assert (config.train.epochs, config.train.max_steps, config.optim.warmup_ratio) == (1.0, None, 0.03)
    assert config.model.vision is not None and config.model.vision.layer == -2


def test_every_problem_stands_in_one_message() -> None:
    text = problems(
        seed="many", optim={"learning_rate": 1, "lr": "fast", "schedule": "cosin"}, trian={}, batch={"micro_batch_size": True}
    )
    for line in (
        "seed = 'many' is not an integer",
        "optim.learning_rate is not a setting",
        "optim.lr = 'fast' is not a number",
        "did you mean 'cosine'?",
        "trian is not a setting; did you mean 'train'?",
        "batch.micro_batch_size = True is not an integer",
    ):
        assert line in text
    assert text.count("\n  - ") == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output_dir": None}, "output_dir is required"),
        ({"model": {"llm": {"path": None}}}, "model.llm.path is required"),
        ({"data": {"sources": None}}, "data.sources is empty"),
        ({"data": {"sources": [{}]}}, "data.sources.0.path is required"),
        ({"data": {"sources": [{"path": "a.json"}, {"path": "b/a.json"}]}}, "two data.sources are called 'a'"),
        ({"data": {"sources": {"path": "a"}}}, "data.sources = {'path': 'a'} is not a list"),
        ({"data": {"media_wrap": ["<a>"]}}, "data.media_wrap = ['<a>'] is not a pair"),
        ({"optim": {"betas": [0.9]}}, "optim.betas = [0.9] is not a list of 2"),
        ({"optim": {"lr": 0.0}}, "optim.lr = 0.0 is not positive"),
        ({"optim": {"lr": float("nan")}}, "optim.lr = nan is not positive"),
        ({"optim": {"clip_norm": -1}}, "optim.clip_norm = -1.0 is negative"),
        ({"optim": {"warmup_ratio": 0.1, "warmup_steps": 3}}, "both named"),
        ({"train": {"epochs": 1, "max_steps": 3}}, "both named"),
        ({"train": {"epochs": 0}}, "train.epochs = 0.0 is not positive"),
        ({"batch": {"global_batch_size": 2, "micro_batch_size": 4}}, "larger than"),
        ({"checkpoint": {"resume": "last"}}, "checkpoint.resume = 'last'"),
        ({"model": {"vision": None}}, "[model.vision_projector] has no effect without [model.vision]"),
        ({"model": {"vision_projector": None}}, "[model.vision] has no effect without [model.vision_projector]"),
        ({"model": {"llm": {"tune": "frozen"}, "vision_projector": {"tune": "frozen", "path": "x"}}}, "nothing learns"),
        ({"model": {"vision_projector": {"tune": "frozen"}}}, "without weights"),
        ({"model": {"llm": {"tune": "full"}}, "lora": {"rank": 8}}, "[lora] has no effect"),
        ({"model": {"llm": {"tune": "frozen", "lr": 1.0}}}, "model.llm.lr = 1.0 has no effect"),
        ({"model": {"vision_projector": {"lr": 1.0}}, "optim": {"projector_lr": 1.0}}, "it has an lr of its own"),
        ({"parallel": {"strategy": "ddp", "reshard_after_forward": False}}, "has no effect with parallel.strategy = 'ddp'"),
        ({"parallel": {"shard_size": 2}}, "parallel.shard_size = 2 has no effect with parallel.strategy = 'fsdp'"),
        ({"parallel": {"strategy": "hsdp"}}, "parallel.shard_size = 0 with parallel.strategy = 'hsdp'"),
        ({"parallel": {"strategy": "hsdp", "shard_size": 1}}, "parallel.shard_size = 1 with parallel.strategy = 'hsdp'"),
        ({"validation": {"every": 3}}, "[validation] has no effect"),
        ({"data": {"on_bad_sample": "error", "max_bad_fraction": 0.5}}, "data.max_bad_fraction has no effect"),
        ({"model": {"vision": None, "vision_projector": None}, "data": {"image_fit": "square"}}, "data.image_fit has no effect"),
        ({"data": {"workers": 10_000}}, "data.workers = 10000 is more than 512"),
        ({"lora": {"targets": 3}}, "lora.targets = 3 is not a string or a list of strings"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], expected: str) -> None:
    assert expected in problems(**changes)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_step=3", "train.max_step is not a setting; did you mean 'train.max_steps'?"),
        ("train.global_batch_size=8", "train.global_batch_size is not a setting; did you mean 'batch.global_batch_size'?"),
        (
            "data.media_root='a'",
            "data.media_root is not a setting; did you mean 'data.sources.N.media_root' or 'data.validation.N.media_root'?",
        ),
        ("train.every=3", "train.every is not a setting; did you mean 'checkpoint.every' or 'validation.every' or 'log.every'?"),
        ("train={epoch=1.0}", "train.epoch is not a setting; did you mean 'train.epochs'?"),
        ("optim.lr = true", "optim.lr = True is not a number"),
    ],
)
def test_a_problem_with_a_setting_of_the_command_line_names_it(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml({**MINIMAL, "trains": 1}))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), ["seed=7", override])
    lines = str(caught.value).splitlines()
    assert sorted(lines[1:]) == sorted(
        [f"  - override {override!r}: {expected}", "  - trains is not a setting; did you mean 'train'?"]
    )


def test_blocks_are_compiled_or_not_or_where_they_can_be() -> None:
    assert parse_config({**MINIMAL, "parallel": {"compile": "or_eager"}}, "x").parallel.compile == "or_eager"
    assert "parallel.compile = 'always' is not true or false or 'or_eager'" in problems(parallel={"compile": "always"})
    assert "'none' | 'selective' | 'full' | 'auto'" in problems(parallel={"activation_checkpointing": "some"})


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(MINIMAL))
    config = load_config(str(path), ["optim.lr=3", "model.llm.path=other/llm", "data.sources.0.name=mix", "train.max_steps=2"])
    assert (config.optim.lr, config.model.llm.path, config.data.sources[0].key, config.train.max_steps) == (
        3.0,
        "other/llm",
        "mix",
        2,
    )
    for bad, expected in (("optim.lr", "no override"), ("data.sources.7.path=x", "no index"), ("output_dir.x=1", "is a value")):
        with pytest.raises(ConfigError, match=expected):
            load_config(str(path), [bad])


def test_unreadable_files(tmp_path: Path) -> None:
    for content, expected in ((None, "no such file"), ("a = = 1", "not TOML"), ("#" * 2_000_000, "larger than")):
        path = tmp_path / "run.toml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=expected):
            load_config(str(path))


def test_the_resolved_file_reads_back_the_same() -> None:
    config = parse_config(merged(MINIMAL, {"data": {"sources": [{"path": 'a "b"\\c\n.json', "media_root": {"image": "x"}}]}}), "x")
    text = to_toml(to_tables(config))
    assert parse_config(tomllib.loads(text), "again") == config
    assert to_toml(to_tables(parse_config(tomllib.loads(text), "again"))) == text


@given(
    st.dictionaries(st.sampled_from(["model", "data", "seed", "optim", "stage", "lora", "nonsense"]), VALUES_OF_TOML, max_size=4)
)
def test_whatever_is_written_there_is_one_clear_error_or_a_run(tables: dict[str, Any]) -> None:
    try:
        parse_config(merged(MINIMAL, tables), "fuzz")
    except ConfigError as error:
        assert str(error).startswith("fuzz:\n  - ")


@pytest.mark.parametrize("table", ["sources", "validation"])
def test_a_media_root_of_no_modality_is_named_with_the_nearest_one(table: str) -> None:
    wrong = [{"path": "b.json", "media_root": {"images": "x"}}]
    text = problems(data={table: wrong})
    assert f"data.{table} 'b': media_root.images is no kind of medium; did you mean 'image'?" in text


@pytest.mark.parametrize("tune", ["frozen", "lora"])
def test_new_tokens_are_refused_where_their_rows_cannot_learn(tune: str) -> None:
    text = problems(model={"llm": {"tune": tune, "new_tokens": ["<a>"]}})
    assert f"model.llm.new_tokens = ['<a>'] could never be learned with model.llm.tune = '{tune}'" in text
    parse_config(merged(MINIMAL, {"model": {"llm": {"tune": "full", "new_tokens": ["<a>"]}}}), "x")


def test_a_recipe_is_named_instead_of_a_path() -> None:
    config = load_config("recipe:llava15_lora")
    assert (config.lora.rank, config.lora.alpha, config.output_dir) == (128, 256, "runs/llava15_lora")


@pytest.mark.parametrize("name", ["llava15", "../recipes/llava15_lora", "", "slurm"])
def test_an_unknown_recipe_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such recipe; there are .*llava15_finetune, llava15_lora, llava15_pretrain"):
        load_config(f"recipe:{name}")
