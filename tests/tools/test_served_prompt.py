"""Law of exports: where the chat template asks otherwise than training did, the export says so."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data.processor import Processor
from data.text.template import load_template
from tests.support.tiny_tokenizers import tiny_tokenizer
from tools.exports.served_prompt import prompt_notes

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}SPACE\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def notes(name: str, space: str | None, template_name: Any = "auto") -> list[str]:
    tokenizer: Any = copy.deepcopy(tiny_tokenizer("qwen" if space is not None else name))
    if space is not None:
        tokenizer.chat_template = TEMPLATE.replace("SPACE", space)
    template = load_template(template_name, tokenizer)
    return list(prompt_notes(cast(Processor, SimpleNamespace(template=template, tokenizer=tokenizer))))


def test_a_template_that_asks_otherwise_than_it_answers_is_told() -> None:
    """LLaVA-OneVision's on the hub: a space behind the role of every turn, and none in its generation prompt."""
    assert notes("", "") == []
    (note,) = notes("", " ")
    assert "behind '" in note and r"assistant \n'" in note and r"ends with '" in note and r"assistant\n': answers" in note


@pytest.mark.parametrize("name", ["qwen", "llama3", "mistral", "phi3"])
def test_templates_that_ask_as_they_answer_are_not_mentioned(name: str) -> None:
    assert notes(name, None) == []


@pytest.mark.parametrize("name", ["plain", "vicuna_v1", "chatml"])
def test_our_own_formats_ask_as_they_answer(name: str) -> None:
    assert notes("bytes", None, name) == []
