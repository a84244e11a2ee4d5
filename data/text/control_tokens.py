"""Control tokens of a tokenizer: which of them a template may rely on, and which a person may not write."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerFast

from data.text.chat_formats import FORMATS
from model.errors import ConfigError


def check_single(name: str, tokenizer: PreTrainedTokenizerFast, needs: Sequence[str]) -> None:
    """Raise one `ConfigError` for all tokens that template `name` needs and the tokenizer does not read as a single token."""
    known = tokenizer.get_vocab()
    read = {token: tokenizer(token, add_special_tokens=False)["input_ids"][-1:] for token in needs}
    missing = [token for token in needs if token not in known or read[token] != [known[token]]]
    if missing:
        what, which = ("is no single token", "it") if len(missing) == 1 else ("are no single tokens", "them")
        listed = ", ".join(f'"{token}"' for token in missing)
        raise ConfigError(
            f"data.template = {name!r} ends or starts turns with {', '.join(map(repr, missing))}, which {what} of this tokenizer; "
            f'choose another template, or add {which} with model.llm.new_tokens = [{listed}] and model.llm.tune = "new_tokens" '
            '(nothing else of the language model learns) or "full"'
        )


def needed_tokens(name: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return the texts that must be single tokens for template `name`. Raises `ConfigError` for those that are not."""
    if name != "auto" and name not in FORMATS:
        raise ConfigError(f"data.template = {name!r} is not known; allowed: auto, {', '.join(FORMATS)}")
    if not tokenizer.is_fast:
        raise ConfigError(f"data.template: {type(tokenizer).__name__} gives no offsets; a folder with tokenizer.json is needed")
    check_single(name, tokenizer, needs := FORMATS[name].needs if name in FORMATS else ())
    return needs


def special_ids(tokenizer: PreTrainedTokenizerFast, free: Collection[str]) -> dict[str, int]:
    """Return the id of each control token by its text, the longest text first, but of none in `free`, which contents may use."""
    found = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content not in free}
    return dict(sorted(found.items(), key=lambda pair: len(pair[0]), reverse=True))


def written_pattern(control: Sequence[str], ours: str) -> re.Pattern[str]:
    """Compile a pattern for the texts `control`, or, as group "ours" and before them, for the text `ours`.

    Alternatives of one first character stand together behind it: a search then skips what begins with no such character at once,
    where each of hundreds of alternatives would be tried at every character of a text.
    """
    groups = {ours[0]: [f"(?P<ours>{re.escape(ours[1:])})"]}
    for text in control:
        groups.setdefault(text[0], []).append(re.escape(text[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in groups.items()))


def unknown_only_id(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the set with the id of the unknown token; without it where that token is also BOS or EOS, as GPT-2's is."""
    other_uses = {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    return {tokenizer.unk_token_id} - other_uses


def lead_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the BOS token if the tokenizer puts it before every text by itself, else an empty string."""
    with_it, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    added = len(with_it) > len(without) and with_it[0] == tokenizer.bos_token_id
    return tokenizer.bos_token if added else ""


def thought_tags(source: str) -> set[str]:
    """Return the tags of thoughts (`<think>`, `</think>`) that a chat template looks for in contents, control tokens or not.

    In an answer these tags are structure, not text.
    """
    return {tag for tag in ("<think>", "</think>") if tag in source}
