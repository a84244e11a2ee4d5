"""Keys of a record, beside its turns and media, that decide the prompt or what is learned in some trainer.

These keys are read here, or refused by name. All other keys are notes and are left alone.
"""

from __future__ import annotations

from data.records.fields import FieldError, is_absent, kind_of
from data.records.turn_keys import LEARN_KEYS
from data.records.turns import Turn, check_text
from model.files.untrusted import Json

_PREFERENCES = ("chosen_response", "rejected_messages", "rejected_images")
_REFUSED = {
    **dict.fromkeys(_PREFERENCES, "says which answer is preferred, and is not read here; write it as chosen and rejected"),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking"), "changes what the template writes and is not read here"),
    "documents": "changes what the template writes and is not read here",
    "history": "holds earlier turns and is not read here; write them as turns",
}
_COPIES = frozenset(
    {"prompt", "completion", "instruction", "input", "output", "query", "response", "system_prompt", "system_message"}
)
"""Keys of formats without turns. Many sets keep them beside the turns made from them: harmless if they hold nothing else."""

_BOXES = ("<bbox>", "<ref-object>")
"""Where ms-swift writes the words of a record's `objects`."""
_CUTS = ("start", "end", "video_start", "video_end")
"""Seconds of a video that are watched, as VideoChat and Qwen write them beside it."""


def with_system(raw: Json, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
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


def check_record_keys(raw: Json, turns: tuple[Turn, ...]) -> None:
    """Raise `FieldError` for a key that another trainer would act on and that is not read here."""
    has_video = not (is_absent(raw.get("video")) and is_absent(raw.get("videos")))
    is_whole_video = has_video and is_absent(raw.get("video_range"))
    for key, value in raw.items():
        if is_absent(value):
            continue
        if key in _REFUSED:
            raise FieldError(key, f"{_REFUSED[key]}: remove it")
        if key in LEARN_KEYS and _unlearned(key, value):
            raise FieldError(key, "says that the record is not learned; say it of its answers, or leave the record out")
        if key == "objects" and any(mark in turn.content for turn in turns for mark in _BOXES):
            raise FieldError(key, f"fills {' and '.join(_BOXES)} of the turns and is not read here; write its words into them")
        if key in _CUTS and _is_seconds(value) and is_whole_video:
            raise FieldError(key, "may say what is watched of the video and is not read here; write video_range, or remove it")
        if key in _COPIES and not (isinstance(value, str) and any(value.strip() in turn.content for turn in turns)):
            raise FieldError(key, "holds what no turn of the record says, and is not read here; make it a turn, or remove it")


def _unlearned(key: str, value: object) -> bool:
    """Tell whether the key marks all answers as not learned; a weight or a loss that is another number is a note."""
    return value is False or (key == "weight" and not isinstance(value, bool) and value == 0)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
