"""Laws of names that other trainers give to settings: who writes one is told the key here, never another one that looks alike."""

from __future__ import annotations

import difflib
import re

import pytest

from model.errors import ConfigError
from tests.support.config import MINIMAL
from trainer.runfile.load import parse_config
from trainer.runfile.other_names import _NAMES, own_name
from trainer.runfile.settings import find_settings, list_settings

KEYS = {setting.key for setting in list_settings()}
TABLES = {setting.table for setting in list_settings()}
FOREIGN = [
    ("optim", "learning_rate", "optim.lr"),
    ("train", "learning_rate", "optim.lr"),
    ("", "learning_rate", "optim.lr"),
    ("lora", "lora_r", "lora.rank"),
    ("lora", "r", "lora.rank"),
    ("train", "num_train_epochs", "train.epochs"),
    ("batch", "gradient_accumulation_steps", "batch.global_batch_size"),
    ("optim", "max_grad_norm", "optim.clip_norm"),
    ("train", "bf16", "model.dtype"),
    ("data", "cutoff_len", "data.max_length"),
    ("data", "image_folder", "media_root of each [[data.sources]]"),
    ("checkpoint", "save-steps", "checkpoint.every"),
    ("optim", "Optimizer", "optim.kind"),
]


def told(table: str, key: str) -> str:
    tables = {**MINIMAL, **({table: {**MINIMAL.get(table, {}), key: 1}} if table else {key: 1})}
    with pytest.raises(ConfigError) as caught:
        parse_config(tables, "x")
    return next(line for line in str(caught.value).splitlines() if "is not a setting" in line)


@pytest.mark.parametrize(("table", "key", "here"), FOREIGN)
def test_a_name_of_other_trainers_is_answered_with_the_key(table: str, key: str, here: str) -> None:
    assert f"{table}.{key}".lstrip(".") + f" is not a setting; here it is {here}" in told(table, key)


def test_a_key_that_merely_looks_a_little_alike_is_not_proposed() -> None:
    for table, key in (("data", "path"), ("data", "train"), ("model", "name")):
        assert "known here: " in told(table, key)


def test_every_answer_is_a_setting_and_no_name_is_one() -> None:
    for here in _NAMES:
        keys = re.findall(r"\[\[?[a-z_.]+\]\]?|[a-z_]+(?:\.[a-z_]+)+", here)
        assert keys and all(key in TABLES or key in KEYS for key in keys), here
    names = [name for others in _NAMES.values() for name in others]
    assert len(names) == len(set(names)) and not KEYS.intersection(names)
    assert all(name == name.lower() and own_name(name) for name in names)


def test_a_search_for_such_a_name_finds_the_key() -> None:
    with pytest.raises(ConfigError, match=r"'gradient_accumulation_steps': .* here it is batch\.global_batch_size"):
        find_settings("gradient_accumulation_steps")


def test_names_are_no_worse_than_spelling() -> None:
    """A slip of the fingers is still answered by spelling: no setting's own slip is taken for a foreign name."""
    for key in KEYS:
        name = key.rpartition(".")[2]
        slip = name[:-1] + name[-1] * 2
        assert not own_name(slip) and difflib.SequenceMatcher(None, slip, name).ratio() > 0.6
