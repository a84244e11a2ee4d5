"""Tokens and rows of the vocabulary: which rows learn, and which tokens lie beyond the base's matrix, where no row was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.text.tokenizer import LoadedTokenizer as Tokens
from model.card import language_model_config, read_card
from model.config import LlmConfig, ModelConfig
from model.errors import ConfigError
from model.files.hub import hugging_face_config
from model.llm.causal_lm import VocabularyLayout
from model.media_spec import PLACEHOLDERS, READ_BY

SHOWN = 8


@dataclass(frozen=True)
class Surplus:
    """Tokens of the base's own tokenizer whose ids lie beyond the rows of its matrix: those that learn and those never read."""

    learned: dict[str, int]  # their rows start as the mean of the others, and learn
    unread: frozenset[int]  # ids that no sample may hold, such as a padding token

    def __str__(self) -> str:
        return (
            f"the tokenizer of model.llm.path has {_listed(self.learned)} beyond the rows of the embedding: their rows start as "
            "the mean of the others, and learn"
        )


def num_base_rows(model: ModelConfig) -> int:
    """Return the number of rows of the base's vocabulary matrix: the number in config.json, which its files must match."""
    rows: int = hugging_face_config("model.llm.path", language_model_config(model)).vocab_size
    return rows


def plan_vocabulary(model: ModelConfig, tokens: Tokens, num_rows: int) -> VocabularyLayout:
    """Plan the rows that the vocabulary matrices of the run's model must hold."""
    size = max(tokens.tokenizer.get_vocab().values()) + 1  # ids may leave gaps
    return VocabularyLayout(size, tokens.num_known, tokens.new_ids, tuned_ids(model.llm, tokens, num_rows))


def tuned_ids(llm: LlmConfig, vocabulary: Tokens, num_rows: int | None = None) -> tuple[int, ...]:
    """Return the ids of the tokens whose rows alone learn in the language model, ascending; () unless its `tune` is "new_tokens".

    Raises `ConfigError` for a token that has one of the `num_rows` rows of the base (None: as many as its tokenizer has tokens),
    because that row is not new.
    """
    if llm.tune != "new_tokens":
        return ()
    ids = {token: int(vocabulary.tokenizer.convert_tokens_to_ids(token)) for token in llm.new_tokens}
    beyond = float("inf") if num_rows is None else num_rows
    if known := [token for token, id in ids.items() if id not in vocabulary.new_ids and id < beyond]:
        raise ConfigError(
            f"model.llm.new_tokens: {', '.join(map(repr, known))} are in the tokenizer of model.llm.path already, so their rows "
            "are not new and tune = 'new_tokens' does not train them: remove them, or use tune = 'full'"
        )
    return tuple(sorted(ids.values()))


def check_surplus(model: ModelConfig, tokens: Tokens, num_rows: int) -> Surplus:
    """Refuse tokens of the base's tokenizer that have no row in its matrix and could not learn one.

    A row that stays the mean of the others carries no meaning. Placeholders are exempt, because media replace their rows, and so is
    a padding token, as long as no sample holds it. Returns the tokens whose rows learn, and the padding token. Raises
    `ConfigError`.
    """
    found = {t: int(i) for t, i in tokens.tokenizer.get_vocab().items() if i >= num_rows and i not in tokens.new_ids}
    if found and model.init_from:  # an earlier run passed this check, and its matrix has rows for the tokens it knew
        found = {token: i for token, i in found.items() if i >= read_card(Path(model.init_from)).vocabulary.size}
    encoders = {"image": model.vision, "audio": model.audio}
    read = {PLACEHOLDERS[kind] for kind, modality in READ_BY.items() if encoders[modality] is not None}
    read |= {part.placeholder for part in encoders.values() if part is not None}
    found = {token: i for token, i in sorted(found.items(), key=lambda item: item[1]) if token not in read}
    if model.llm.tune == "full":
        return Surplus(found, frozenset())
    learned = {t: i for t, i in found.items() if model.llm.tune == "new_tokens" and t in model.llm.new_tokens}
    tokenizer = tokens.tokenizer
    # Rows are filled up with the padding token, behind a mask, if it has no other meaning.
    other_roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    padding = tokenizer.pad_token if tokenizer.pad_token not in other_roles else None
    if lost := {token: i for token, i in found.items() if token not in learned and token != padding}:
        raise ConfigError(
            f"model.llm.path = {model.llm.path!r}: its tokenizer has {len(lost)} token(s) beyond the {num_rows} rows of the "
            f"embedding: {_listed(lost)}; their rows would be the mean of the others, and with model.llm.tune = "
            f"{model.llm.tune!r} never learn. Use tune = 'full', or tune = 'new_tokens' with them in model.llm.new_tokens, or the "
            "tokenizer that belongs to this base"
        )
    return Surplus(learned, frozenset(i for token, i in found.items() if token == padding))


def _listed(tokens: dict[str, int]) -> str:
    names = ", ".join(f"{token!r} ({i})" for token, i in list(tokens.items())[:SHOWN])
    return names + (f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else "")
