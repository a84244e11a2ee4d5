"""Keys of a turn beside speaker and content: whether the turn is learned, what the template gets, what is ignored.

Every other key with a value is an error: a key may change the prompt or what is learned, and no such key may stay unread.
"""

from __future__ import annotations

from data.records.fields import FieldError, is_absent, kind_of
from data.records.tool_calls import read_calls
from model.files.untrusted import Json

LEARN_KEYS = ("weight", "loss", "trainable", "train")
"""Keys that say whether an answer is learned: OpenAI's and FastChat's 0 or 1, and the booleans of ms-swift, verl and axolotl."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of what an assistant thinks before it answers, as several formats name them; the first name is ours."""
_CALL_KEYS = ("tool_calls", "function_call")
_TOOL_KEYS = ("tool_call_id", "name")
SILENT_KEYS = frozenset(
    {
        *("id", "message_id", "uuid", "turn_id", "turn_identifier", "parent", "parent_id", "openai_id", "conversation_id"),
        *("index", "idx", "turn_idx", "timestamp", "created", "created_at", "create_time", "update_time", "date", "time"),
        *("model", "model_name", "temperature", "top_p", "token_count", "token_counter", "num_tokens", "usage"),
        *("finish_reason", "logprobs", "annotations", "lang", "language", "country", "hashed_ip", "header", "source"),
        *("md5", "hash"),
        *("markdown", "rating", "score", "feedback", "toxic", "redacted", "moderation", "detoxify_moderation", "state"),
        *("canonical_form", "system_fingerprint", "info", "meta", "metadata", "extra_info", "tags", "category", "topic"),
        *("user_id", "username", "author", "avatar", "turn", "round", "turn_index", "created_date", "emotion", "tokens"),
        *("review_count", "review_result", "deleted", "rank", "synthetic", "emojis", "labels", "tree_state", "message_tree_id"),
    }
)
"""Keys that data sets carry on their turns and that change neither a prompt nor what is learned in any trainer."""


_KNOWN = SILENT_KEYS.union(LEARN_KEYS, THOUGHT_KEYS, _CALL_KEYS, _TOOL_KEYS)


def is_learned(turn: Json, role: str, field: str) -> bool:
    """Return whether the turn is supervised if it is an answer. Raises `FieldError` for values that say neither, or both."""
    found = {key: _learns(key, turn[key], field) for key in LEARN_KEYS if turn.get(key) is not None}
    if len(set(found.values())) > 1:
        yes, no = (next(key for key, learns in found.items() if learns is wanted) for wanted in (True, False))
        raise FieldError(f"{field}.{no}", f"says that the turn is not learned, {yes!r} that it is; keep one")
    if role != "assistant" and True in found.values():
        key = next(iter(found))
        raise FieldError(f"{field}.{key}", f"asks to learn a turn of the {role}, but only the assistant's answers are learned")
    return False not in found.values()


def _learns(key: str, value: object, field: str) -> bool:
    """Return what one of LEARN_KEYS says. Raises `FieldError` for values that it may not have."""
    if key == "weight":
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
            raise FieldError(f"{field}.weight", f"{str(value)[:60]!r} is neither 0 (not learned) nor 1 (learned)")
    elif not isinstance(value, bool):
        raise FieldError(f"{field}.{key}", f"is {kind_of(value)}, not true (learned) or false (not learned)")
    return bool(value)


def for_template(turn: Json, role: str, field: str) -> Json:
    """Return what the template gets beside role and content. Raises `FieldError` where a key is out of place or makes no sense."""
    found: Json = {}
    calls = [key for key in _CALL_KEYS if not is_absent(turn.get(key))]
    if len(calls) > 1:
        raise FieldError(f"{field}.tool_calls", "both 'tool_calls' and 'function_call' are there; keep one")
    for key in calls:
        _check_role(role, "assistant", f"{field}.{key}")
        found["tool_calls"] = read_calls(turn[key], f"{field}.{key}")
    thoughts = {key: turn[key] for key in THOUGHT_KEYS if not is_absent(turn.get(key))}
    for key, value in thoughts.items():
        _check_role(role, "assistant", f"{field}.{key}")
        found["reasoning_content"] = _text(value, f"{field}.{key}")
    if len(thoughts) > 1:
        raise FieldError(f"{field}.{min(thoughts)}", f"{' and '.join(map(repr, thoughts))} are there; keep one")
    for key in _TOOL_KEYS:
        if not is_absent(turn.get(key)):
            _check_role(role, "tool", f"{field}.{key}")
            found[key] = _text(turn[key], f"{field}.{key}")
    return found


def check_keys(turn: Json, own: tuple[str, str], field: str) -> None:
    """Raise `FieldError` for a key with a value that is neither one of the turn's `own` two keys nor a known key."""
    for key, value in turn.items():
        if key == "text" and value == turn.get(own[1]):  # raw ShareGPT keeps the words twice
            continue
        if key not in own and key not in _KNOWN and not is_absent(value):
            raise FieldError(
                f"{field}.{key}",
                f"is {kind_of(value)} under a key that is not read on a turn; it may change the prompt or what is learned: remove "
                "it, or move it beside the turns if it is only a note",
            )


def _check_role(role: str, allowed: str, field: str) -> None:
    if role != allowed:
        raise FieldError(field, f"stands on a turn of the {role}; only a turn of the {allowed} has one")


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"is {kind_of(value)}, not a string")
    return value
