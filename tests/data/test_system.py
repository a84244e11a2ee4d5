"""`data.system`: the system text of records that have none, in training and in answers, stored with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.check.certificate import _problem
from data.config import DataConfig
from data.processor import Processor, load_processor
from data.records.record import parse
from data.text.template import Template, TemplateOptions, load_template
from tests.support.tiny_data import talk
from tests.support.tiny_tokenizers import tiny_tokenizer

SYSTEM = 'You see "pictures" \\ and {{ answer }}.\n\u4f60\u597d'
FORMATS = [("auto", "qwen"), ("auto", "qwen3"), ("auto", "llama3"), ("chatml", "qwen"), ("mpt", "qwen"), ("vicuna_v1", "llama")]


def made(name: str, tokenizer: str, **options: Any) -> Template:
    return load_template(name, tiny_tokenizer(tokenizer), TemplateOptions(**options))


def asked(system: str = "") -> Any:
    turns = talk("What is this?", "A cat.", "And this?", "A mat.")
    first = [{"from": "system", "value": system}] if system else []
    return parse({**turns, "conversations": first + turns["conversations"]}, "records:0")


@pytest.mark.parametrize(("name", "tokenizer"), FORMATS)
def test_a_record_without_a_system_turn_is_read_as_if_it_had_the_configured_one(name: str, tokenizer: str) -> None:
    plain, given = made(name, tokenizer), made(name, tokenizer, system=SYSTEM)
    expected, found = plain.encode(asked(SYSTEM)), given.encode(asked())
    assert found.input_ids == expected.input_ids and found.supervised == expected.supervised
    assert found.input_ids != plain.encode(asked()).input_ids
    assert given.encode(asked("Short.")).input_ids == plain.encode(asked("Short.")).input_ids
    question = parse({"conversations": [{"from": "human", "value": "Hi"}]}, "records:0", needs_answer=False)
    written = parse(
        {"conversations": [{"from": "system", "value": SYSTEM}, {"from": "human", "value": "Hi"}]}, "records:0", needs_answer=False
    )
    assert given.prompt(question) == plain.prompt(written)
    assert given.stop_ids == plain.stop_ids
    assert _problem(given, asked(), found, in_full=True) == ""


def test_the_shape_of_llavas_and_internvls_prompts() -> None:
    record = parse(talk("Q", "A", "R", "B"), "records:0")
    template = made("mpt", "qwen", system="Answer the questions.")
    text = tiny_tokenizer("qwen").decode(template.encode(record).input_ids)
    start, end = "<|im_start|>", "<|im_end|>"
    turns = [f"{start}{role}\n{said}{end}" for role, said in zip(("user", "assistant") * 2, "QARB")]
    assert text == f"{start}system\nAnswer the questions.{end}" + "".join(turns)


def test_it_is_stored_with_a_run_and_refused_where_there_is_no_system_turn(tmp_path: Path) -> None:
    config = DataConfig("chatml", system=SYSTEM)
    processor = Processor(made("chatml", "qwen", system=SYSTEM), {}, config)
    processor.save(tmp_path)
    again = load_processor(tmp_path)
    assert (
        again.config.system == SYSTEM and again.template.encode(asked()).input_ids == processor.template.encode(asked()).input_ids
    )
    assert any("'plain'" in line for line in DataConfig("plain", system="x").problems())
