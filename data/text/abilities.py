"""Detection of what a chat template writes beside contents: reasoning, tool calls, tool turns.

Each ability is found by rendering probe conversations, not by the template's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model.files.untrusted import Json

Message = Json  # role, content, and what else a turn has: tool_calls, reasoning_content, tool_call_id, name
Ask = Callable[[Sequence[Message]], str]
"""Function that renders a conversation; it raises `RenderError` where the template refuses the conversation."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_QUESTION: Message = {"role": "user", "content": "a"}
_GAP = "\n" * 8  # more than any template writes by itself
_WORDS = {"user": "a", "assistant": "b"}
_CALL = {"type": "function", "id": "call00000", "function": {"name": "qzname", "arguments": {"qzkey": "qzvalue"}}}


@dataclass(frozen=True)
class Abilities:
    """Abilities of one chat template, as `find_abilities` found them."""

    reasoning: str = ""  # the key under which the template reads an answer's reasoning; "" if it writes none
    calls: bool = False  # the template writes tool calls ...
    null_content: bool = False  # ... only beside a content that is null, as DeepSeek-V3's does
    text_arguments: bool = False  # ... only with arguments that are JSON texts
    tool_turns: bool = False  # the template writes a tool's turn in a form of its own
    leads: frozenset[str] = frozenset()  # roles of which it keeps the white space before the words
    trails: frozenset[str] = frozenset()  # roles of which it keeps the white space after the words

    def express(self, message: Message) -> Message:
        """Return the message in the form that the template reads.

        Reasoning moves to the template's own key. In a message with tool calls, arguments become JSON texts and an empty content
        becomes null where the template needs that.
        """
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
        """Return the key of the message that the template does not write ("tool" for a tool's turn), or an empty string."""
        if message["role"] == "tool" and not self.tool_turns:
            return "tool"
        if message.get("tool_calls") and not self.calls:
            return "tool_calls"
        return "reasoning_content" if message.get("reasoning_content") and not self.reasoning else ""


def _with_text(call: Mapping[str, object]) -> Json:
    """Return a tool call whose arguments are JSON text instead of an object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return dict(call)
    text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def find_abilities(ask: Ask) -> Abilities:
    """Find out what the template behind `ask` writes, by rendering probe words that no template contains by itself."""
    answers = {key: _answer(ask, _QUESTION, {"role": "assistant", "content": "b", key: "qzthought"}) for key in REASONING_KEYS}
    reasoning = next((key for key, text in answers.items() if "qzthought" in text), "")
    forms = [(null, text) for text in (False, True) for null in (False, True)]
    found = next((form for form in forms if _writes_calls(ask, *form)), None)
    null, text = found or (False, False)
    edges = _answer(ask, {"role": "user", "content": f"{_GAP}a{_GAP}"}, {"role": "assistant", "content": f"{_GAP}b{_GAP}"})
    return Abilities(
        reasoning=reasoning,
        calls=found is not None,
        null_content=null,
        text_arguments=text,
        tool_turns=_writes_tools(ask, [probe_call(null, text)] if found else []),
        leads=frozenset(role for role, word in _WORDS.items() if f"{_GAP}{word}" in edges),
        trails=frozenset(role for role, word in _WORDS.items() if f"{word}{_GAP}" in edges),
    )


def _answer(ask: Ask, *messages: Message) -> str:
    """Render the messages; return an empty string if the template fails."""
    try:
        return ask(messages)
    except Exception:  # a template does not write what makes it fail
        return ""


def probe_call(null_content: bool = False, text_arguments: bool = False) -> Message:
    """Return an assistant's turn that calls a tool, in the form that the two flags describe."""
    abilities = Abilities("", True, null_content, text_arguments)
    return abilities.express({"role": "assistant", "content": "", "tool_calls": [_CALL]})


def _writes_calls(ask: Ask, null_content: bool, text_arguments: bool) -> bool:
    """Return whether the template writes name, key and value of a tool call that has this form."""
    text = _answer(ask, _QUESTION, probe_call(null_content, text_arguments))
    return all(word in text for word in ("qzname", "qzkey", "qzvalue"))


def _writes_tools(ask: Ask, before: Sequence[Message]) -> bool:
    """Return whether the template writes a tool's turn, and writes it differently from a user's and an assistant's turn."""
    turn = {"content": "qzresult", "tool_call_id": "call00000", "name": "qzname"}
    written = [_answer(ask, _QUESTION, *before, {**turn, "role": role}) for role in ("tool", "user", "assistant")]
    return "qzresult" in written[0] and written[0] not in written[1:]
