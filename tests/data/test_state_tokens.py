"""Laws of state tokens: a reply starts with what it answers, learned as its first token and asked for by every prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from data.check.certificate import certify
from data.config import DataConfig
from data.processor import Processor, load_processor
from data.records.record import Record, RecordError, parse
from data.text.state_tokens import STATE_TOKENS, split_state
from data.text.template import Template, TemplateOptions, load_template
from model.batch import Batch
from model.errors import ConfigError
from tests.support.formats import index_of, talk, template, text
from tests.support.tiny_data import SPECS
from tests.support.tiny_tokenizers import NAMES, unigram
from tools import evaluate

GLYPHS = {"audio": "☞", "negative": "☟", "text": "☜"}
DIGITS = {"audio": "<1>", "negative": "<2>", "text": "<3>"}


def spoken(**extra: Any) -> Record:
    return talk("<audio>", "yes", "<image> so?", "a cat", "<audio> noise", "no", **extra)


def test_the_tokens_are_vitas() -> None:
    assert STATE_TOKENS == {"none": {}, "glyphs": GLYPHS, "digits": DIGITS}


@pytest.mark.parametrize(("kind", "tokens"), [("glyphs", GLYPHS), ("digits", DIGITS)])
@pytest.mark.parametrize("name", ["vita_qwen", "chatml", "vita_mixtral", "llama2", "gemma", "phi3"])
def test_each_reply_starts_with_what_it_answers(name: str, kind: str, tokens: dict[str, str]) -> None:
    plain, made = template(name), template(name, state_tokens=kind)
    record = spoken(inserted_id=5)
    states = ["audio", "text", "negative"]
    # The row is the one of a record whose answers are written that way.
    answers = iter(states)
    turns = [
        dataclasses.replace(t, content=tokens[next(answers)] + t.content) if t.role == "assistant" else t for t in record.turns
    ]
    by_hand = plain.encode(dataclasses.replace(record, turns=tuple(turns)))
    encoded = made.encode(record)
    assert encoded == by_hand != plain.encode(record)
    # The state is learned, and the prompt ends before it.
    prompt = made.prompt(dataclasses.replace(record, turns=record.turns[:-1]))
    assert encoded.input_ids[: len(prompt)] == prompt and encoded.supervised[len(prompt)]
    learned = made.tokenizer.decode([i for i, s in zip(encoded.input_ids[len(prompt) :], encoded.supervised[len(prompt) :]) if s])
    assert learned.strip().startswith(tokens["negative"] + "no")
    assert [state for state in states if tokens[state] in text(made, record)] == states


def test_replies_to_text_have_a_state_in_every_record() -> None:
    made = template("vita_qwen", state_tokens="digits")
    assert "assistant\n<3>a<|im_end|>\n" in text(made, talk("q", "a", "r", "b"))
    assert text(made, talk("q", "a", "r", "b")).endswith("assistant\n<3>b<|im_end|>")
    assert "assistant\n<1>a<|im_end|>" in text(made, talk("<audio>", "a"))
    assert "assistant\n<2>a<|im_end|>" in text(made, talk("<audio>", "a", inserted_id=1))
    # Only the turn before counts, and only where it was said.
    assert text(made, talk("<audio>", "a", "q", "b")).endswith("assistant\n<3>b<|im_end|>")
    assert "<1>" not in text(template("vita_qwen"), talk("<audio>", "a"))


def test_a_dropped_leading_answer_does_not_shift_the_negative_one() -> None:
    turns = [("gpt", "Hi."), ("human", "<audio>"), ("gpt", "a"), ("human", "<audio>"), ("gpt", "b")]
    raw = {"audio": ["x", "y"], "inserted_id": 2, "conversations": [{"from": r, "value": v} for r, v in turns]}
    written = text(template("vita_qwen", state_tokens="digits"), parse(raw, "m.json:1"))
    assert "\n<2>a<" in written and "\n<1>b<" in written


def test_interrupted_replies_keep_their_state() -> None:
    written = text(template("vita_qwen", state_tokens="glyphs"), talk("<audio>", "well", end_tag=False))
    assert written.endswith("<|im_start|>assistant\n☞well")


def test_states_are_certified(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "id": 2,
            "audio": "x",
            "inserted_id": 1,
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        {
            "id": 3,
            "audio": "x",
            "end_tag": False,
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
    ]
    for name in ("vita_mixtral", "vita_qwen", "gemma"):
        for kind in ("glyphs", "digits"):
            assert len(certify(template(name, state_tokens=kind), index_of(tmp_path, rows), "rows").rows) == 3


@pytest.mark.parametrize(("kind", "tokens"), [("glyphs", GLYPHS), ("digits", DIGITS)])
def test_decoded_answers_are_split(kind: str, tokens: dict[str, str]) -> None:
    for state, token in tokens.items():
        assert split_state(f"{token}A cat.", kind) == (state, "A cat.")
        assert split_state(f" {token} A cat.", kind) == (state, " A cat.")
        assert split_state(f"A {token}", kind) == (None, f"A {token}")
        assert split_state(f"{token}A cat.", "none") == (None, f"{token}A cat.")
    assert split_state(" A cat.", kind) == (None, " A cat.")
    assert split_state("", kind) == (None, "")


def test_an_answer_that_has_a_state_already_is_named() -> None:
    record = talk("q", "<2>a")
    with pytest.raises(
        RecordError, match=r"f.json:7 r: conversations: an answer starts with '<2>', which data.state_tokens = 'digits'"
    ):
        template("vita_qwen", state_tokens="digits").encode(record)
    assert "☜<2>a" in text(template("vita_qwen", state_tokens="glyphs"), record)


def test_a_tokenizer_that_cannot_write_them_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.state_tokens = 'glyphs': the tokenizer only knows '☞' as <unk>; add it with "):
        load_template("vicuna_v1", unigram(), TemplateOptions(state_tokens="glyphs"))


def single(name: str) -> Template:
    """A template of a tokenizer that has the glyphs as special tokens, as model.llm.new_tokens adds them."""
    tokenizer = NAMES[name]()
    tokenizer.add_tokens(["<image>", "<audio>", *GLYPHS.values()], special_tokens=True)
    return load_template("vita_mixtral" if name == "llama" else "vita_qwen", tokenizer, TemplateOptions(state_tokens="glyphs"))


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_states_may_be_control_tokens(name: str) -> None:
    made = single(name)
    encoded, known = made.encode(spoken(inserted_id=5)), made.tokenizer.get_vocab()
    states = [i for i in encoded.input_ids if i in {known[glyph] for glyph in GLYPHS.values()}]
    assert states == [known["☞"], known["☜"], known["☟"]]
    starts = [k for k, s in enumerate(encoded.supervised) if s and not encoded.supervised[k - 1]]
    assert [encoded.input_ids[k] for k in starts] == states


class Parrot:
    """A model that has learned every record by heart, states and all."""

    def __init__(self, texts: dict[str, str], processor: Processor) -> None:
        self.texts, self.processor = texts, processor

    def generate(self, prompts: Batch, max_new_tokens: int) -> list[list[int]]:
        asked = [self.processor.tokenizer.decode(row) for row in prompts.input_ids.tolist()]
        answers = [next(a for q, a in self.texts.items() if q in text) for text in asked]
        return [[*self.processor.tokenizer(a, add_special_tokens=False)["input_ids"], *self.processor.stop_ids] for a in answers]

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        return torch.zeros(()), 1


@pytest.mark.parametrize("made", [template("vita_qwen", state_tokens="digits"), single("qwen")], ids=["text", "control token"])
def test_an_answer_that_was_learned_with_its_state_matches_its_record(made: Template, tmp_path: Path) -> None:
    """`tools.evaluate` and `tools.chat` read answers by the same function."""
    processor = Processor(made, {}, DataConfig("vita_qwen", state_tokens=made.state_tokens))  # type: ignore[arg-type]
    token = STATE_TOKENS[processor.config.state_tokens]["text"]
    rows = [{"conversations": [{"from": "human", "value": f"q{i}?"}, {"from": "gpt", "value": f"answer {i}"}]} for i in range(3)]
    net: Any = Parrot({f"q{i}?": f"{token}answer {i}" for i in range(3)} | {"q2?": f"{token} other"}, processor)
    options: dict[str, Any] = {"media_root": "", "max_new_tokens": 9, "batch_size": 2}
    totals = evaluate.Totals()
    for answered in evaluate.answers(net, processor, index_of(tmp_path, rows), **options):
        totals.add(answered)
    assert totals.result()["exact_match"] == 2 / 3
    ids = net.generate(processor(rows[:1]), 9)
    assert processor.answers(ids) == [("text", "answer 0")] and processor.answers([[]]) == [(None, "")]


def test_a_saved_processor_writes_them_too(tmp_path: Path) -> None:
    made = template("vita_qwen", state_tokens="digits")
    config = DataConfig("vita_qwen", state_tokens="digits")
    Processor(made, SPECS, config).save(tmp_path / "final")
    loaded = load_processor(tmp_path / "final")
    record = talk("q", "a", "<audio>", "b")
    assert loaded.config == config and loaded.template.encode(record) == made.encode(record)
