"""Laws of templates with thoughts and tools: ids are the template's own, learned is what it leaves of the answers."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest

from data.check.certificate import encode_proven
from data.records.record import Record, RecordError, Turn
from data.text.template import Encoded, Template, load_template
from tests.support.tiny_tokenizers import tiny_tokenizer

CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2, "b": "two"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}
# As DeepSeek-V3.1 writes them: thoughts are never kept, and the generation prompt closes or opens one.
CLOSED = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<s>' + m.content + '<|im_start|>' }}
{%- else %}{{ '</think>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<think>' if thinking else '</think>' }}{% endif %}"""
# As the distilled DeepSeek-R1: what stands behind a thought is kept to the character.
DISTILLED = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<s>' + m.content }}
{%- else %}{{ '<|im_start|>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|><think>\\n' }}{% endif %}"""
# As gpt-oss: a channel for each part of an answer, another end for the last one.
CHANNELS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role }}
{%- if m.role == 'assistant' and m.thinking and loop.last %}
{{- ' analysis<s>' + m.thinking + '<|im_end|><|im_start|>assistant' }}
{%- endif %}
{%- if m.role == 'assistant' %}{{ ' final<s>' + m.content + ('</s>' if loop.last else '<|im_end|>') }}
{%- else %}{{ '<s>' + m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""

# As Gemma 4: strings of a call stand between control tokens, and the token that begins a result ends the turn with the call.
QUOTED = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<s>' + m.content + '</s>' }}
{%- elif m.role == 'tool' %}{{ 'result ' + m.content + '<|im_end|>' }}
{%- else %}{{ ('<|im_start|>' if loop.previtem.role == 'user' else '') + m.content }}
{%- for call in m.tool_calls or [] %}{{ '<|im_start|>' + call.function.name + '{' }}
{%- for key, value in call.function.arguments.items() %}
{{- key + ':' + ('<s>' + value + '<s>' if value is string else value | string) }}
{%- endfor %}{{ '}<|im_start|>' + ('<|im_end|>' if loop.last else '') }}{% endfor %}
{%- if not m.tool_calls %}{{ '</s>' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}{{ '<|im_start|>' }}{% endif %}"""


def own(source: str, tokenizer: str = "bytes") -> Template:
    copy = type(tiny_tokenizer(tokenizer))(tokenizer_object=tiny_tokenizer(tokenizer).backend_tokenizer, chat_template=source)
    return load_template("auto", copy)


def qwen3() -> Template:
    return load_template("auto", tiny_tokenizer("qwen3"))


def talk(*turns: Turn | str, **extra: Any) -> Record:
    made = [t if isinstance(t, Turn) else Turn(("user", "assistant")[i % 2], t) for i, t in enumerate(turns)]
    return Record("r", tuple(made), (), "f.json:7", **extra)


def reference(template: Template, record: Record) -> list[int]:
    messages = [{"role": t.role, "content": t.content, **t.extra} for t in record.turns]
    given = {"tools": list(record.tools)} if record.tools else {}
    return list(template.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given))


def learned(template: Template, encoded: Encoded) -> list[str]:
    runs = re.finditer("x+", "".join("x" if s else "-" for s in encoded.supervised))
    return [template.tokenizer.decode(encoded.input_ids[slice(*run.span())]) for run in runs]


THOUGHT = "<think>\ntwo and two\n</think>\n\n4"
CASES: dict[str, tuple[tuple[Turn | str, ...], list[str], int]] = {
    "thought": (("q", THOUGHT), [THOUGHT + "<|im_end|>"], 0),
    "loose thought": (("q", "<think>two and two</think>4"), [THOUGHT + "<|im_end|>"], 0),
    "earlier thought": (("q", THOUGHT, "r", "5"), ["4<|im_end|>", "5<|im_end|>"], 1),
    "both": (("q", THOUGHT, "r", THOUGHT), ["4<|im_end|>", THOUGHT + "<|im_end|>"], 1),
    "no thought": (("q", "4"), ["4<|im_end|>"], 0),
    "empty thought": (("q", "<think>\n\n</think>\n\n4"), ["4<|im_end|>"], 0),
    "line break": (("q", "\n4"), ["4<|im_end|>"], 0),
    "closing tag alone": (("q", "two and two</think>4"), [THOUGHT + "<|im_end|>"], 0),
    "opening tag alone": (("q", "a <think> b"), ["a <think> b<|im_end|>"], 0),
    "thought in question": (("<think>q</think> r", "4"), ["4<|im_end|>"], 0),
    "reasoning": (("q", Turn("assistant", "4", extra={"reasoning_content": "two and two"})), [THOUGHT + "<|im_end|>"], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_thoughts_are_learned_as_the_template_writes_them(case: str) -> None:
    template, (turns, expected, removed) = qwen3(), CASES[case]
    record = talk(*turns)
    encoded = encode_proven(template, record)
    assert encoded.input_ids == reference(template, record)
    assert learned(template, encoded) == expected and encoded.removed == removed
    first = encoded.supervised.index(True) if len(expected) == 1 else None
    if first is not None:
        assert template.prompt(talk(turns[0]), record.turns[-1]) == encoded.input_ids[:first]


def test_the_prompt_follows_the_kind_of_answer() -> None:
    template = qwen3()
    ask = lambda **switch: template.tokenizer.apply_chat_template(  # noqa: E731
        [{"role": "user", "content": "q"}], add_generation_prompt=True, return_dict=False, **switch
    )
    assert template.prompt(talk("q")) == ask(enable_thinking=False)
    assert template.prompt(talk("q"), Turn("assistant", THOUGHT)) == ask(enable_thinking=True)


def test_tools_and_calls_are_the_templates_own() -> None:
    template = qwen3()
    called = Turn("assistant", "", extra={"tool_calls": [CALL]})
    result = Turn("tool", "4", extra={"tool_call_id": "call00001", "name": "add"})
    record = talk("q", called, result, Turn("assistant", "It is 4."), Turn("user", "r"), Turn("assistant", "b"), tools=(TOOL,))
    encoded = encode_proven(template, record)
    assert encoded.input_ids == reference(template, record)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "two"}}\n</tool_call><|im_end|>'
    assert learned(template, encoded) == [call, "It is 4.<|im_end|>", "b<|im_end|>"]
    # A call and its answer are one round.
    text = template.tokenizer.decode(encoded.input_ids[: encoded.round_ends[0]])
    assert len(encoded.round_ends) == 2 and text.endswith("It is 4.<|im_end|>\n")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk("q", "a", tools=(TOOL,)), "f.json:7 r: tools: the chat template does not render them"),
        (talk("q", Turn("assistant", "a", extra={"tool_calls": [CALL]})), "tool_calls: the chat template does not render"),
        (talk("q", Turn("assistant", "a", extra={"reasoning_content": "b"})), "reasoning_content: the chat template does not"),
        (talk("q", Turn("assistant", "a"), Turn("tool", "4"), Turn("assistant", "b")), "tool: the chat template does not"),
    ],
)
def test_a_template_that_drops_a_key_is_refused_by_the_keys_name(record: Record, message: str) -> None:
    with pytest.raises(RecordError, match=re.escape(message)):
        load_template("vicuna_v1", tiny_tokenizer("llama")).encode(record)


def test_turns_that_are_not_to_be_learned_are_read() -> None:
    template = qwen3()
    whole, some = talk("q", "a", "r", "b"), talk("q", Turn("assistant", "a", learn=False), "r", "b")
    encoded = encode_proven(template, some)
    assert encoded.input_ids == template.encode(whole).input_ids and encoded.round_ends == template.encode(whole).round_ends
    assert learned(template, encoded) == ["b<|im_end|>"]
    with pytest.raises(RecordError, match="no token is supervised"):
        template.encode(talk("q", Turn("assistant", "a", learn=False)))


@pytest.mark.parametrize(("b", "written"), [("two", "<s>two<s>"), (2, "2")])
def test_a_call_is_learned_up_to_what_ends_its_turn_not_to_a_quotation_mark(b: Any, written: str) -> None:
    template = own(QUOTED)
    call = {**CALL, "function": {"name": "add", "arguments": {"b": b}}}
    called, result = Turn("assistant", "", extra={"tool_calls": [call]}), Turn("tool", "4", extra={"tool_call_id": "call00001"})
    whole = f"<|im_start|>add{{b:{written}}}<|im_start|><|im_end|>"
    for record, expected in ((talk("q", called), [whole]), (talk("q", called, result, Turn("assistant", "c")), [whole, "c</s>"])):
        encoded = encode_proven(template, record)
        assert encoded.input_ids == reference(template, record) and learned(template, encoded) == expected
    assert set(template.tokenizer.convert_ids_to_tokens(template.stop_ids)) == {"</s>", "<|im_end|>"}


def test_control_tokens_in_calls_and_tools_stay_text() -> None:
    template = qwen3()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "x<|im_end|>y"}}}
    tool = {"type": "function", "function": {"name": "add", "description": "<|im_start|>"}}
    record = talk(
        "q", Turn("assistant", "", extra={"tool_calls": [call]}), Turn("tool", "4"), Turn("assistant", "b"), tools=(tool,)
    )
    encoded, known = template.encode(record), template.tokenizer.get_vocab()
    assert [encoded.input_ids.count(known[t]) for t in ("<|im_start|>", "<|im_end|>")] == [5, 5]
    assert '"x<|im_end|>y"' in learned(template, encoded)[0]


def test_a_prompt_that_closes_the_thought_is_no_part_of_the_answer() -> None:
    template = own(CLOSED)
    encoded = encode_proven(template, talk("q", "a", "r", "<think>t</think>b"))
    assert encoded.input_ids == reference(template, talk("q", "a", "r", "<think>t</think>b"))
    assert learned(template, encoded) == ["a</s>", "b</s>"] and encoded.removed == 1


@pytest.mark.parametrize("space", ["", "\n", "\n\n", " ", "\n\n ", " \n "])
def test_white_space_behind_a_removed_thought_is_the_answers(space: str) -> None:
    template = own(DISTILLED)
    record = talk("q", f"<think>s</think>{space}ab c", "r", f"<think>t</think>{space}ab c")
    encoded = encode_proven(template, record)
    assert encoded.input_ids == reference(template, record) and encoded.removed == 2
    assert learned(template, encoded) == [f"{space}ab c</s>"] * 2


def test_a_blank_thought_is_asked_for_as_a_blank_one() -> None:
    record = talk("q", Turn("assistant", "4", extra={"reasoning_content": "\n"}))
    assert encode_proven(qwen3(), record).input_ids == reference(qwen3(), record)


def test_channels_of_an_answer_are_learned() -> None:
    template = own(CHANNELS)
    record = talk("q", "a", "r", Turn("assistant", "b", extra={"reasoning_content": "t"}))
    assert template.abilities.reasoning in ("reasoning_content", "thinking")
    encoded = encode_proven(template, record)
    last = " analysis<s>t<|im_end|><|im_start|>assistant final<s>b</s>"
    assert learned(template, encoded) == [" final<s>a<|im_end|>", last]


@pytest.mark.parametrize("thought", ["", "<think>t</think>", "<think>\n\n</think>\n\n"])
def test_words_of_an_interrupted_answer_are_the_end_of_its_row(thought: str) -> None:
    encoded = encode_proven(qwen3(), talk("q", f"{thought}4", interrupted=True))
    assert learned(qwen3(), encoded) == [("<think>\nt\n</think>\n\n" if "t</" in thought else "") + "4"]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Turn("assistant", "", extra={"tool_calls": [CALL]}), "calls of tools"),
        (Turn("assistant", "4", extra={"tool_calls": [CALL]}), "calls of tools"),
        (Turn("assistant", "<think>t</think>"), "a tag of the template"),
        (Turn("assistant", "<think>\nt\n</think>\n\n"), "a tag of the template"),
        (Turn("assistant", "<think>\n\n</think>", extra={"reasoning_content": "t"}), "a tag of the template"),
    ],
)
def test_an_interrupted_answer_that_ends_without_words_is_refused_when_it_is_read(answer: Turn, what: str) -> None:
    """Its row would end inside a call or a thought, and the certificate refuses that."""
    with pytest.raises(RecordError, match=f"f.json:7 r: end_tag: is false, but the last answer ends with {what}"):
        qwen3().encode(talk("q", answer, interrupted=True))
    qwen3().encode(talk("q", answer))


WORDS = (
    "a",
    "b c",
    " ",
    "\n",
    "\n\n",
    "<think>",
    "</think>",
    "<tool_call>",
    "<tool_response>",
    "<|im_end|>",
    ".",
    ">",
    "\r\n",
    "\u3000",
)


def any_record(rng: random.Random) -> Record:
    """A conversation of one to three rounds, with calls, their results, thoughts, and answers that are not learned."""

    def words() -> str:
        return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))

    def answer(**extra: Any) -> Turn:
        extra |= {"reasoning_content": words()} if rng.random() < 0.3 else {}
        return Turn("assistant", rng.choice(["", "a"]) if "tool_calls" in extra else f"{words()}a", rng.random() < 0.8, extra)

    turns = [Turn("system", words())] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        turns.append(Turn("user", words()))
        for _ in range(rng.choice([0, 0, 1, 2])):
            turns += [answer(tool_calls=[CALL]), Turn("tool", words(), extra={"tool_call_id": "call00001", "name": "add"})]
        turns.append(answer())
    return Record("r", tuple(turns), (), "f.json:7", tools=rng.choice([(), (TOOL,)]), interrupted=rng.random() < 0.2)


def test_what_training_reads_the_certificate_accepts() -> None:
    """Also conversations whose last turn is no answer, as those that are asked with are."""
    template, rng, read = qwen3(), random.Random(11), 0
    for _ in range(120):
        record = any_record(rng)
        for some in (record, replace(record, turns=record.turns[:-1])):
            try:
                encoded = template.encode(some)
            except RecordError:
                continue
            assert encode_proven(template, some) == encoded
            read += 1
    assert read > 80
