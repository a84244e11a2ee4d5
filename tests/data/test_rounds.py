"""Laws of long records: rendering does not grow with the square of the rounds, and what cannot fit is never tokenised."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from data.records.record import Record, Turn
from data.text import render, rounds, tokens
from data.text.rounds import TooLongError
from data.text.template import Template, load_template
from tests.support.data.template_records import talk
from tests.support.tiny_tokenizers import tiny_tokenizer

PAIRS = [
    *((name, "auto") for name in ("qwen", "qwen3", "llama3", "mistral", "mistral3", "phi3")),
    *(("llama", "vicuna_v1"), ("llama_first", "llama2"), ("llama_always", "mistral"), ("bytes_bos", "chatml"), ("gemma", "gemma")),
    *(("internlm2", "internlm2"), ("qwen", "mpt"), ("qwen", "vita_qwen"), ("llama", "vita_mixtral")),
]
LIMIT = 64


def template(tokenizer: str, name: str) -> Template:
    return load_template(name, tiny_tokenizer(tokenizer))


@pytest.fixture()
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Renderings of the template, and characters that were tokenised."""
    done = {"renderings": 0, "characters": 0}
    plain, call, count = render.apply, tokens._call, rounds._count

    def apply(*args: Any, **kwargs: Any) -> str:
        done["renderings"] += 1
        return plain(*args, **kwargs)

    def counted(inner: Any) -> Any:
        def tokenised(tokenizer: Any, text: str) -> Any:
            done["characters"] += len(text)
            return inner(tokenizer, text)

        return tokenised

    monkeypatch.setattr(render, "apply", apply)
    monkeypatch.setattr(tokens, "_call", counted(call))
    monkeypatch.setattr(rounds, "_count", counted(count))
    return done


@pytest.mark.parametrize(("tokenizer", "name"), PAIRS)
def test_what_is_kept_has_the_ids_of_the_whole(tokenizer: str, name: str) -> None:
    made = template(tokenizer, name)
    for record in (talk(40), talk(100, "猫\n\n", " \u00e9 a\n"), talk(8, answer="one two  three\n" * 12), talk(90, "", "b")):
        whole, part = made.encode(record), made.encode(record, LIMIT)
        fitting = [end for end in whole.round_ends if end <= LIMIT]
        n = len(part.round_ends)
        assert n >= len(fitting) and n < len(whole.round_ends) == part.num_rounds
        assert part.round_ends == whole.round_ends[:n] and len(part.input_ids) == part.round_ends[-1]
        assert part.input_ids == whole.input_ids[: part.round_ends[-1]]
        assert part.supervised == whole.supervised[: part.round_ends[-1]]


def test_a_record_that_is_not_long_is_encoded_whole() -> None:
    made = template("qwen", "auto")
    assert made.encode(talk(3), 4096) == made.encode(talk(3))


@pytest.mark.parametrize("text", ["word " * 200_000, "x" * 1_000_000, "猫" * 300_000, "\n" * 1_000_000 + "x"])
def test_a_text_that_cannot_fit_is_known_after_a_limits_worth(text: str, work: dict[str, int]) -> None:
    made = template("qwen3", "auto")
    work["characters"] = 0
    with pytest.raises(TooLongError, match=r"the first round takes more than 64 tokens, data\.max_length is 64"):
        made.encode(Record("r", (Turn("user", text), Turn("assistant", "a")), (), "f.json:7"), LIMIT)
    assert work["characters"] <= 64 * LIMIT
    later = Record("r", (*talk(1).turns, Turn("user", text), Turn("assistant", "a")), (), "f.json:7")
    work["characters"] = 0
    assert made.encode(later, LIMIT).num_rounds == 2 and len(made.encode(later, LIMIT).round_ends) == 1
    assert work["characters"] <= 128 * LIMIT


def test_a_long_thought_that_the_template_takes_out_does_not_count() -> None:
    made, thought = template("qwen3", "auto"), "<think>" + "hm " * 2000 + "</think>4"
    record = Record("r", (Turn("user", "q"), Turn("assistant", thought), *talk(1).turns), (), "f.json:7")
    encoded = made.encode(record, LIMIT)
    assert encoded == made.encode(record) and encoded.removed == 1 and len(encoded.input_ids) < LIMIT


@pytest.mark.parametrize(("tokenizer", "name"), [("qwen3", "auto"), ("llama", "vicuna_v1"), ("llama3", "auto")])
def test_rounds_cost_no_renderings(tokenizer: str, name: str, work: dict[str, int]) -> None:
    made = template(tokenizer, name)
    made.encode(Record("r", (Turn("system", "s"), *talk(1).turns), (), "f.json:7"))  # asks for the generation prompt
    counts = []
    for num_rounds in (1, 64, 500, 1, 64, 500):
        work["renderings"] = 0
        made.encode(talk(num_rounds))
        counts.append(work["renderings"])
    assert counts == [2, 2, 2, 1, 1, 1]  # a shape's second conversation needs no marks


def test_a_conversation_of_very_many_rounds_is_bounded(work: dict[str, int]) -> None:
    made = template("qwen3", "auto")
    many = talk(20_000)
    work["characters"] = 0
    encoded = made.encode(many, LIMIT)
    assert encoded.num_rounds == 20_000 and work["characters"] <= 128 * LIMIT


def test_rounds_that_fit_without_an_answer_to_learn_are_too_long() -> None:
    made, record = template("qwen3", "auto"), talk(400)
    turns = tuple(dataclasses.replace(turn, learn=k > 700) for k, turn in enumerate(record.turns))
    with pytest.raises(TooLongError, match="no round that fits has an answer to learn"):
        made.encode(dataclasses.replace(record, turns=turns), LIMIT)


LAST = """\
{%- for m in messages if m.role != 'system' %}
{{- '<s>' + (messages[0].content if loop.revindex == 2 and messages[0].role == 'system' else '') + m.content + '</s>' }}
{%- endfor %}"""


def test_rounds_go_together_where_the_template_writes_the_systems_words_last() -> None:
    base = tiny_tokenizer("bytes").backend_tokenizer
    copy = type(tiny_tokenizer("bytes"))(tokenizer_object=base, chat_template=LAST)
    made = load_template("auto", copy)
    with_system = lambda n: dataclasses.replace(talk(n), turns=(Turn("system", "Be brief."), *talk(n).turns))  # noqa: E731
    encoded = made.encode(with_system(3), 4096)
    assert encoded.round_ends == [len(encoded.input_ids)] and len(made.encode(talk(3)).round_ends) == 3
    with pytest.raises(TooLongError, match="its rounds, which go together in this template, take more than 64 tokens"):
        made.encode(with_system(100), LIMIT)
