"""Laws of remembered layouts: a conversation has the same ids, spans and errors whatever was rendered before it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.records.record import Record, RecordError, Turn
from data.text import layouts, render
from data.text.control_tokens import written_pattern
from data.text.template import Template, load_template
from data.text.tokens import tokenize
from tests.support.data.template_records import PAIRS, records, talk
from tests.support.tiny_tokenizers import tiny_tokenizer

WARM = {pair: load_template(pair[1], tiny_tokenizer(pair[0])) for pair in PAIRS}


def outcome(template: Template, record: Record) -> object:
    try:
        return template.encode(record)
    except RecordError as error:
        return str(error)


def fresh(template: Template) -> Template:
    """The same template, which remembers nothing."""
    return dataclasses.replace(template)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_was_rendered_before_changes_nothing(data: st.DataObject) -> None:
    pair = data.draw(st.sampled_from(PAIRS))
    record = data.draw(records(pair[1], controls=data.draw(st.booleans())))
    expected = outcome(fresh(WARM[pair]), record)
    assert outcome(WARM[pair], record) == expected
    assert outcome(WARM[pair], record) == expected


MOODY = """\
{%- for m in messages %}
{{- '<s>' + ('loud ' if m.content|length > 8 else '') + m.role + ' ' }}
{{- (m.content if '!' not in m.content else m.content|upper) + '</s>' }}
{%- endfor %}"""


def test_a_template_that_looks_into_the_words_is_held_to_its_own_text() -> None:
    base = tiny_tokenizer("bytes").backend_tokenizer
    made = load_template("auto", PreTrainedTokenizerFast(tokenizer_object=base, chat_template=MOODY))
    for answer in ("a", "a long answer", "c", "another long one", "a!", "d"):
        record = Record("r", (Turn("user", "q"), Turn("assistant", answer)), (), "f.json:7")
        assert outcome(made, record) == outcome(fresh(made), record)
    assert "rewrites a content" in str(outcome(made, Record("r", (Turn("user", "q"), Turn("assistant", "a!")), (), "f.json:7")))


def test_a_layout_that_is_not_the_texts_is_not_taken() -> None:
    made = fresh(WARM["qwen", "chatml"])
    expected = made.encode(talk(2))
    (shape, layout), *_ = ((s, k) for s, k in made.layouts._known.items() if len(s[0]) == 4)
    for k in range(len(layout.between)):
        changed = list(layout.between)
        changed[k] += "\n"
        made.layouts._known[shape] = dataclasses.replace(layout, between=tuple(changed))
        assert made.encode(talk(2)) == expected
        assert made.layouts._known[shape] == layout


def test_few_shapes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "MAX_SHAPES", 3)
    made = fresh(WARM["qwen", "chatml"])
    for num_rounds in range(1, 9):
        made.encode(talk(num_rounds))
    assert len(made.layouts._known) == 3


@pytest.mark.parametrize("content", [" a", "a\n", "<think>t</think>a", "a<|im_end|>", ""])
def test_contents_that_need_marks_get_them(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh(WARM["qwen3", "auto"])
    record = Record("r", (Turn("user", content), Turn("assistant", "a")), (), "f.json:7")
    made.encode(record)
    plain, count = render.apply, 0

    def apply(*args: Any, **kwargs: Any) -> str:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(render, "apply", apply)
    made.encode(record)
    assert count == 2


def spans(pattern: re.Pattern[str], text: str) -> list[tuple[tuple[int, int], bool]]:
    return [(match.span(), match["ours"] is None) for match in pattern.finditer(text)]


@pytest.mark.parametrize("ours", ["<image>", "<b><image></b>", "[<image>]"])
def test_the_pattern_of_control_tokens_finds_what_plain_alternatives_find(ours: str) -> None:
    control = ["<|im_end|>", "<|im|>", "<b>", "[INST]", "</s>", "<s>", "x"]
    naive = re.compile("|".join([f"(?P<ours>{re.escape(ours)})", *map(re.escape, control)]))
    text = "a<|im_end|><b><image></b><image>[<image>]x[INST]</s><<s>[<video>]<|im<|im|><b>"
    assert spans(written_pattern(control, ours), text) == spans(naive, text)
    assert spans(written_pattern([], ours), text) == spans(re.compile(f"(?P<ours>{re.escape(ours)})"), text)


def test_ids_are_the_tokenizers_own_whatever_it_was_told_before() -> None:
    tokenizer = tiny_tokenizer("qwen")
    text = "A cat sits on a mat.<|im_end|>\nYes 🙂"
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokenizer(text, padding="max_length", truncation=True, max_length=4)
    found = tokenize(tokenizer, text, [])
    assert (found.ids, found.offsets) == (expected["input_ids"], expected["offset_mapping"])
    tokenizer.split_special_tokens = True
    try:
        assert tokenize(tokenizer, text, []).ids == tokenizer(text, add_special_tokens=False)["input_ids"] != expected["input_ids"]
    finally:
        tokenizer.split_special_tokens = False


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer whose own call does more than its backend."""

    def __call__(self, text: str, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().__call__(text.upper(), *args, **kwargs)


def test_a_class_of_tokenizers_with_a_call_of_its_own_is_called() -> None:
    shouting = Shouting(tokenizer_object=tiny_tokenizer("bytes").backend_tokenizer)
    assert tokenize(shouting, "a cat", []).ids == tokenize(tiny_tokenizer("bytes"), "A CAT", []).ids
