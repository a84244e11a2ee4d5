"""Keys of a record, beside its turns and media, that decide the prompt or what is learned in some trainer.

These keys are read here, or refused by name. All other keys are notes and are left alone.
"""

from __future__ import annotations

from typing import Any

from data.records.fields import FieldError, is_absent, kind_of
from data.records.turns import Turn, check_text

_PREFERENCES = ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "rejected_images", "kto_tag")
_REFUSED = {
    **dict.fromkeys(_PREFERENCES, "says which answer is preferred; preferences are not learned here"),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking"), "changes what the template writes and is not read here"),
    "documents": "changes what the template writes and is not read here",
    "history": "holds earlier turns and is not read here; write them as turns",
}
_COPIES = frozenset({"prompt", "completion", "instruction", "input", "output", "query", "response", "system_prompt"})
"""Keys of formats without turns. Many sets keep them beside the turns made from them: harmless if they hold nothing else."""


def with_system(raw: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns, behind the record's `system` if it has one. Raises `FieldError` if a system turn says something else."""
    text = raw.get("system")
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        raise FieldError("system", f"is {kind_of(text)}, not a string")
    check_text(text, "system")
    if turns[0].role != "system":
        return (Turn("system", text), *turns)
    if turns[0].content != text:
        raise FieldError("system", "says something else than the record's system turn; keep one")
    return turns


def check_record_keys(raw: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    """Raise `FieldError` for a key that another trainer would act on and that is not read here."""
    for key, value in raw.items():
        if is_absent(value):
            continue
        if key in _REFUSED:
            raise FieldError(key, f"{_REFUSED[key]}: remove it")
        if key == "label" and isinstance(value, bool):  # of any other kind it is a note
            raise FieldError(key, "says whether the answer is wanted; preferences are not learned here: remove it")
        if key in _COPIES and not _is_copy(value, turns):
            raise FieldError(key, "holds what no turn of the record says, and is not read here; make it a turn, or remove it")


def _is_copy(value: Any, turns: tuple[Turn, ...]) -> bool:
    return isinstance(value, str) and any(value.strip() in turn.content for turn in turns)
