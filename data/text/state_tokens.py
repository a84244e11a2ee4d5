"""State tokens: the first token of a reply says what it answers, so that one decoding step tells whether to speak (VITA).

State tokens are text, learned with the answer: VITA 1.0 writes digits, VITA 1.5 glyphs that are one token each for Qwen 2.5.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from data.records.record import Record
from model.errors import ConfigError
from model.media_spec import PLACEHOLDERS

STATE_TOKENS: dict[str, dict[str, str]] = {
    "none": {},
    "glyphs": {"audio": "\u261e", "negative": "\u261f", "text": "\u261c"},
    "digits": {"audio": "<1>", "negative": "<2>", "text": "<3>"},
}
"""State tokens by data.state_tokens: reply to speech, to sound that was not meant for the model, to a text question."""


def reply_state(record: Record, i: int) -> str:
    """Return what the assistant's turn `i` replies to: audio | negative | text.

    Records without media get states as well. VITA's do not, because its media pass skips them; but a model that is read by its
    first token has to write a state each time. After results of tools the assistant still replies to its user.
    """
    if i == record.negative_turn:
        return "negative"
    asked = next(turn for turn in reversed(record.turns[:i]) if turn.role == "user")
    return "audio" if PLACEHOLDERS["audio"] in asked.content else "text"


def split_state(text: str, state_tokens: str) -> tuple[str | None, str]:
    """Split a decoded answer into the state that it starts with and the rest; without a state, into None and the whole text."""
    for state, token in STATE_TOKENS[state_tokens].items():
        if text.lstrip().startswith(token):
            return state, text.lstrip().removeprefix(token)
    return None, text


def check_state_tokens(tokenizer: PreTrainedTokenizerFast, state_tokens: str) -> None:
    """Raise `ConfigError` if the tokenizer cannot write one of the state tokens: all states would look alike."""
    for token in STATE_TOKENS[state_tokens].values():
        if tokenizer.unk_token_id in tokenizer(token, add_special_tokens=False)["input_ids"]:
            listed = ", ".join(f'"{token}"' for token in STATE_TOKENS[state_tokens].values())
            raise ConfigError(
                f"data.state_tokens = {state_tokens!r}: the tokenizer only knows {token!r} as {tokenizer.unk_token}; add it with "
                f"model.llm.new_tokens = [{listed}]"
            )
