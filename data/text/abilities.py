"""What a chat template writes beside contents: reasoning, tool calls, tool turns. It is found out by asking it, not by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # role, content, and what else a turn has: tool_calls, reasoning_content, tool_call_id, name
Ask = Callable[[Sequence[Message]], str]
"""Renders a conversation; raises `RenderError` where the template refuses it."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_QUESTION: Message = {"role": "user", "content": "a"}
_GAP = "\n" * 8  # more than any template writes by itself
_WORDS = {"user": "a", "assistant": "b"}
_CALL = {"type": "function", "id": "call00000", "function": {"name": "qzname", "arguments": {"qzkey": "qzvalue"}}}


@dataclass(frozen=True)
class Abilities:
    """What was found out of one template."""

    reasoning: str = ""  # the key under which it reads an answer's reasoning; "" where it writes none
    calls: bool = False  # it writes tool calls ...
    null_content: bool = False  # ... only beside a content that is null, as DeepSeek-V3's does
    text_arguments: bool = False  # ... only with arguments that are JSON texts
    tool_turns: bool = False  # it writes a tool's turn in a way of its own
    leads: frozenset[str] = frozenset()  # roles whose white space it keeps before their words
    trails: frozenset[str] = frozenset()  # and after them

    def express(self, message: Message) -> Message:
        """The message in the form that the template reads."""
        made = dict(message)
        if "reasoning_content" in made and self.reasoning:
            made[self.reasoning] = made.pop("reasoning_content")
        if made.get("tool_calls"):
            if self.text_arguments:
                made["tool_calls"] = [_with_text(call) for call in made["tool_calls"]]
            if self.null_content and made["content"] == "":
                made["content"] = None
        return made

    def lacking(self, message: Message) -> str:
        """The key of a message that the template does not write, or nothing."""
        if message["role"] == "tool" and not self.tool_turns:
            return "tool"
        if message.get("tool_calls") and not self.calls:
            return "tool_calls"
        return "reasoning_content" if message.get("reasoning_content") and not self.reasoning else ""


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return dict(call)
    text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def find_abilities(ask: Ask) -> Abilities:
    """Asks the template behind `ask` with words that it cannot know."""
    said = {key: _answer(ask, _QUESTION, {"role": "assistant", "content": "b", key: "qzthought"}) for key in REASONING_KEYS}
    reasoning = next((key for key, text in said.items() if "qzthought" in text), "")
    forms = [(null, text) for text in (False, True) for null in (False, True)]
    found = next((form for form in forms if _writes_calls(ask, *form)), None)
    null, text = found or (False, False)
    edges = _answer(ask, {"role": "user", "content": f"{_GAP}a{_GAP}"}, {"role": "assistant", "content": f"{_GAP}b{_GAP}"})
    return Abilities(
        reasoning=reasoning,
        calls=found is not None,
        null_content=null,
        text_arguments=text,
        tool_turns=_writes_tools(ask, [calling(null, text)] if found else []),
        leads=frozenset(role for role, word in _WORDS.items() if f"{_GAP}{word}" in edges),
        trails=frozenset(role for role, word in _WORDS.items() if f"{word}{_GAP}" in edges),
    )


def _answer(ask: Ask, *messages: Message) -> str:
    try:
        return ask(messages)
    except Exception:  # whatever a template stumbles over, it does not write
        return ""


def calling(null_content: bool = False, text_arguments: bool = False) -> Message:
    """A turn that calls a tool."""
    abilities = Abilities("", True, null_content, text_arguments)
    return abilities.express({"role": "assistant", "content": "", "tool_calls": [_CALL]})


def _writes_calls(ask: Ask, null_content: bool, text_arguments: bool) -> bool:
    text = _answer(ask, _QUESTION, calling(null_content, text_arguments))
    return all(word in text for word in ("qzname", "qzkey", "qzvalue"))


def _writes_tools(ask: Ask, before: Sequence[Message]) -> bool:
    """Whether a tool's turn is written, and in another way than a user's and an assistant's."""
    turn = {"content": "qzresult", "tool_call_id": "call00000", "name": "qzname"}
    written = [_answer(ask, _QUESTION, *before, {**turn, "role": role}) for role in ("tool", "user", "assistant")]
    return "qzresult" in written[0] and written[0] not in written[1:]
