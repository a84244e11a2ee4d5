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
_CALL = {"type": "function", "id": "call00000", "function": {"name": "qzname", "arguments": {"qzkey": "qzvalue"}}}


@dataclass(frozen=True)
class Abilities:
    """What was found out of one template."""

    reasoning: str = ""  # the key under which it reads an answer's reasoning; "" where it writes none
    calls: bool = False  # it writes tool calls ...
    null_content: bool = False  # ... only beside a content that is null, as DeepSeek-V3's does
    text_arguments: bool = False  # ... only with arguments that are JSON texts
    tool_turns: bool = False  # it writes a tool's turn in a way of its own

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
    said = {key: _answer(ask, {"role": "assistant", "content": "b", key: "qzthought"}) for key in REASONING_KEYS}
    reasoning = next((key for key, text in said.items() if "qzthought" in text), "")
    forms = [(null, text) for text in (False, True) for null in (False, True)]
    found = next((form for form in forms if _writes_calls(ask, *form)), None)
    abilities = Abilities(reasoning, found is not None, *(found or (False, False)))
    return Abilities(reasoning, abilities.calls, abilities.null_content, abilities.text_arguments, _writes_tools(ask, abilities))


def _answer(ask: Ask, *answer: Message) -> str:
    try:
        return ask([_QUESTION, *answer])
    except Exception:  # whatever a template stumbles over, it does not write
        return ""


def calling(null_content: bool = False, text_arguments: bool = False) -> Message:
    """A turn that calls a tool."""
    abilities = Abilities("", True, null_content, text_arguments)
    return abilities.express({"role": "assistant", "content": "", "tool_calls": [_CALL]})


def _writes_calls(ask: Ask, null_content: bool, text_arguments: bool) -> bool:
    text = _answer(ask, calling(null_content, text_arguments))
    return all(word in text for word in ("qzname", "qzkey", "qzvalue"))


def _writes_tools(ask: Ask, abilities: Abilities) -> bool:
    """Whether a tool's turn is written, and in another way than a user's and an assistant's."""
    before = [calling(abilities.null_content, abilities.text_arguments)] if abilities.calls else []
    turn = {"content": "qzresult", "tool_call_id": "call00000", "name": "qzname"}
    written = [_answer(ask, *before, {**turn, "role": role}) for role in ("tool", "user", "assistant")]
    return "qzresult" in written[0] and written[0] not in written[1:]
