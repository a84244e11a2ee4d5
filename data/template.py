"""Records become token ids and, in the same pass, which of them are learned. Placeholders stay one id each."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from data.config import ConfigError
from data.control_tokens import check_single, lead_token, only_unknown, special_ids
from data.formats import FORMATS, freeze_date
from data.messages import Wording, media_kinds, write_messages
from data.placeholders import wrapped_pattern
from data.record import Record, RecordError, Turn
from data.render import Message, RenderError, Span, Tokens, render, supervise, tokenize
from data.state_tokens import STATE_TOKENS, check_state_tokens
from model.batch import PLACEHOLDERS, READ_BY


@dataclass(frozen=True)
class Encoded:
    input_ids: list[int]
    supervised: list[bool]  # the assistant's tokens and what ends its turns
    round_ends: list[int]  # ids up to and including round k, a user's and an assistant's turn


@dataclass(frozen=True)
class _Row:
    """A record as text and ids."""

    text: str
    spans: list[Span]
    tail: str  # what the template writes after the end of the last turn, there or not
    tokens: Tokens
    supervised: list[bool]


@dataclass(frozen=True)
class Template:
    """How conversations are written for one tokenizer. Made by `load_template`."""

    name: str
    source: str  # Jinja; with the token that the tokenizer puts before a text by itself
    tokenizer: PreTrainedTokenizerFast
    placeholders: str  # as_written | first
    media_wrap: tuple[str, ...]
    lead: str  # that token, in a format of ours; "" if the chat template writes it
    ends: re.Pattern[str]  # what ends an assistant's turn
    written: re.Pattern[str]  # control tokens that a content may not use, or, as group "ours", wrapped placeholders
    control_ids: frozenset[int]
    placeholder_ids: dict[str, int]  # by modality
    stop_ids: tuple[int, ...] = ()  # ids that end an assistant's turn
    allowed: tuple[str, ...] = ()  # control tokens that contents may use
    state_tokens: str = "none"  # none | glyphs | digits
    unread: frozenset[int] = frozenset()  # ids of tokens whose rows mean nothing: padding beyond the base's matrix

    @property
    def end_is_token(self) -> bool:
        """Whether turns end with a control token; a newline, which `plain` has, may be part of the answer's last token."""
        return self.name not in FORMATS or bool(FORMATS[self.name].needs)

    def encode(self, record: Record) -> Encoded:
        """Ids of the whole conversation. An answer's leading white space is dropped where the prompt would swallow it.

        Raises `RecordError` if the template cannot express the record, nothing is learned, or an unknown token would be.
        """
        row = self._encode(record)
        ids, supervised = row.tokens.ids, row.supervised
        if not any(supervised):
            raise self._error(record, "no token is supervised")
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown not in self.stop_ids and any(s and i == unknown for i, s in zip(ids, supervised)):
            raise self._error(record, f"an answer holds what the tokenizer only knows as {self.tokenizer.unk_token}")
        return Encoded(ids, supervised, _round_ends(row))

    def prompt(self, record: Record) -> list[int]:
        """Ids up to where the answer to the record's last turn, which is the user's, starts. Raises `RecordError`."""
        row = self._encode(replace(record, turns=(*record.turns, Turn("assistant", "x"))))
        # Never a second rendering: some templates write more before an answer than their generation prompt says.
        cut = row.spans[-1].prompt
        return self._tokenize(row.text[:cut], row.spans[:-1]).ids

    def messages(self, record: Record) -> list[Message]:
        """Turns as the template gets them. Raises `RecordError`."""
        only = self.name in FORMATS and FORMATS[self.name].placeholders_only
        return write_messages(record, Wording(self.name, self.placeholders, self.media_wrap, self.state_tokens, only))

    def _encode(self, record: Record) -> _Row:
        messages = self.messages(record)
        try:
            for _ in range(2):
                text, spans, tail = self._render(record, messages)
                tokens = self._tokenize(text, spans)
                supervised, glued = supervise(spans, tokens, self.control_ids)
                if not glued:
                    break
                messages = [{**m, "content": m["content"].lstrip()} if i in glued else m for i, m in enumerate(messages)]
            else:
                raise RenderError("an answer's first token holds the end of its prompt")
        except RenderError as error:
            raise self._error(record, str(error)) from None
        self._check(record, text, spans, tokens)
        return _Row(text, spans, tail, tokens, supervised)

    def _render(self, record: Record, messages: list[Message]) -> tuple[str, list[Span], str]:
        """Text, turns and tail. An interrupted answer is the text's end: nothing says that it is over (VITA `end_tag`)."""
        text, spans = render(self.tokenizer, self.source, messages, self.ends, media_kinds(record))
        tail = text[spans[-1].end :]
        if record.interrupted and spans[-1].role == "assistant":
            stop = spans[-1].stop
            return text[:stop], [*spans[:-1], replace(spans[-1], end=stop)], tail
        return text, spans, tail

    def _tokenize(self, text: str, spans: Sequence[Span]) -> Tokens:
        """Ids of a rendering, BOS as the tokenizer would put it: as an id, for as text it changes what follows in some."""
        found = [match for s in spans for match in self.written.finditer(text, s.start, s.stop) if match["ours"] is None]
        tokens = tokenize(self.tokenizer, text, [match.span() for match in found], len(self.lead))
        if not self.lead:
            return tokens
        bos = self.tokenizer.convert_tokens_to_ids(self.lead)
        return Tokens([bos, *tokens.ids], [0, *tokens.starts], [len(self.lead), *tokens.stops])

    def _check(self, record: Record, text: str, spans: list[Span], tokens: Tokens) -> None:
        if found := self.unread.intersection(tokens.ids):
            token = self.tokenizer.convert_ids_to_tokens(min(found))
            raise self._error(record, f"the template writes {token!r}, which has no row in the base's embedding and learns none")
        for span in spans:
            ours = [m.span() for m in self.written.finditer(text, span.start, span.stop) if m["ours"] is not None]
            borders = [span.start, *(border for pair in ours for border in pair), span.stop]
            if any(not self.control_ids.isdisjoint(tokens.inside(a, b)) for a, b in zip(borders[::2], borders[1::2])):
                raise self._error(record, "the tokenizer makes a control token of a content's plain text")
        for modality in sorted(set(READ_BY.values())):
            given = [media.kind for media in record.media if media.modality == modality]
            if given and modality not in self.placeholder_ids:
                raise RecordError(
                    record.where, record.id, given[0], f"{len(given)} files, but the model has no part for this modality"
                )
            written = tokens.ids.count(self.placeholder_ids.get(modality, -1))
            if written != len(given):
                raise RecordError(record.where, record.id, modality, f"{written} placeholders in the ids, {len(given)} files")

    def _error(self, record: Record, reason: str) -> RecordError:
        return RecordError(record.where, record.id, "conversations", reason)


def _round_ends(row: _Row) -> list[int]:
    """Where rounds end: after the turn's end and what the template writes after the last one, if it is there as well."""
    ends = []
    for span in row.spans[:-1]:
        if span.role == "assistant":
            stop = span.end + (len(row.tail) if row.text.startswith(row.tail, span.end) else 0)
            ends.append(bisect_left(row.tokens.starts, stop))
    return [*ends, len(row.tokens.ids)]


def load_template(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    placeholders: str,
    media_wrap: tuple[str, ...],
    allowed: Sequence[str] = (),
    state_tokens: str = "none",
    unread: frozenset[int] = frozenset(),
) -> Template:
    """Template `name` for `tokenizer`, tried on a short conversation.

    `allowed` are control tokens that contents may use, as configured new tokens; those that the template or the tokenizer
    itself needs stay text all the same. No record may hold an id of `unread`. Raises `ConfigError` if the tokenizer lacks what
    the template or the states need.
    """
    if name != "auto" and name not in FORMATS:
        raise ConfigError(f"data.template = {name!r} is not known; allowed: auto, {', '.join(FORMATS)}")
    if not tokenizer.is_fast:
        raise ConfigError(f"data.template: {type(tokenizer).__name__} gives no offsets; a folder with tokenizer.json is needed")
    needs = FORMATS[name].needs if name in FORMATS else ()
    check_single(name, tokenizer, needs)
    check_state_tokens(tokenizer, state_tokens)
    states = STATE_TOKENS[state_tokens].values()
    special = special_ids(tokenizer, {*PLACEHOLDERS.values(), *allowed, *states} - {*needs, *tokenizer.special_tokens_map.values()})
    control = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
    known = tokenizer.get_vocab()
    lead = lead_token(tokenizer) if name in FORMATS else ""
    template = Template(
        name=name,
        source=("{{ bos_token }}" if lead else "") + FORMATS[name].source if name in FORMATS else _own_source(tokenizer),
        tokenizer=tokenizer,
        placeholders=placeholders,
        media_wrap=tuple(media_wrap),
        lead=lead,
        ends=re.compile(re.escape(FORMATS[name].end) if name in FORMATS else control),
        written=re.compile(f"(?P<ours>{wrapped_pattern(media_wrap)})|{control}"),
        control_ids=frozenset(special.values()) - only_unknown(tokenizer),
        placeholder_ids={m: known[PLACEHOLDERS[m]] for m in sorted(set(READ_BY.values())) if PLACEHOLDERS[m] in known},
        allowed=tuple(allowed),
        state_tokens=state_tokens,
        unread=unread,
    )
    return replace(template, stop_ids=_stop_ids(template))


def _own_source(tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        return freeze_date(tokenizer.get_chat_template())
    except ValueError:
        raise ConfigError(f"data.template = 'auto': the tokenizer has no chat template; name one: {', '.join(FORMATS)}") from None


def _stop_ids(template: Template) -> tuple[int, ...]:
    """The last id of an answer, as a short conversation shows it, and the tokenizer's eos."""
    tokenizer = template.tokenizer
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, spans = render(tokenizer, template.source, probe, template.ends)
    except RenderError as error:
        raise ConfigError(f"data.template = {template.name!r} cannot be used with this tokenizer: {error}") from error
    tokens = tokenize(tokenizer, text, [], len(template.lead))
    supervised, _ = supervise(spans, tokens, template.control_ids)
    if not any(supervised):
        raise ConfigError(f"data.template = {template.name!r} leaves nothing to learn with this tokenizer")
    last = len(supervised) - 1 - supervised[::-1].index(True)
    eos = tokenizer.eos_token_id
    return tuple(dict.fromkeys([tokens.ids[last], *([] if eos is None else [eos])]))
