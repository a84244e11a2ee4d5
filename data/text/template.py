"""Conversion of records to token ids and, in the same pass, to flags of the ids that are learned. Placeholders stay one id each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from data.records.placeholders import wrapped_placeholder
from data.records.record import Record, RecordError, Turn
from data.text.abilities import Abilities, Message, find_abilities
from data.text.chat_formats import FORMATS, with_system_text
from data.text.control_tokens import lead_token, needed_tokens, special_ids, thought_tags, unknown_only_id, written_pattern
from data.text.encoded import Encoded, Row, check_row, round_ends
from data.text.layouts import Rendering, TextLayouts
from data.text.marks import tags_of
from data.text.messages import Wording, media_kinds, write_messages
from data.text.parts_template import content_tokens, named_source, takes_parts, template_tokens
from data.text.render import Renderer, RenderError, apply
from data.text.rounds import TooLongError, first_rounds, round_starts, rounds_that_may_fit, shortened_turn
from data.text.state_tokens import STATE_TOKENS, check_state_tokens
from data.text.steps import Steps, all_steps
from data.text.tokens import Tokens, supervise, tokenize
from data.text.turn_ends import check_cut, closing_id, last_id
from model.errors import ConfigError
from model.media_spec import DEFAULT_TOKENS, PLACEHOLDERS

_NOTHING = re.compile("(?!)")


@dataclass(frozen=True)
class Template:
    """Chat template for one tokenizer: it writes conversations as token ids. Made by `load_template`."""

    name: str
    source: str  # Jinja; with the token that the tokenizer puts before a text by itself
    tokenizer: PreTrainedTokenizerFast
    placeholders: str  # as_written | first
    media_wrap: tuple[str, ...]
    lead: str  # the BOS token that a format of ours starts with; "" if there is none or the chat template writes it
    ends: re.Pattern[str]  # what ends an assistant's turn
    written: re.Pattern[str]  # control tokens that a content may not use, or, as group "ours", wrapped placeholders
    control_ids: frozenset[int]
    placeholder_ids: dict[str, int]  # by modality
    tokens: dict[str, str]  # what stands for a medium in the contents that the template gets, by modality
    stop_ids: tuple[int, ...] = ()  # ids that end an assistant's turn
    allowed: tuple[str, ...] = ()  # control tokens that contents may use
    state_tokens: str = "none"  # none | glyphs | digits
    system: str = ""  # system text of conversations that have none; "": the template's own
    unread: frozenset[int] = frozenset()  # ids whose embedding rows mean nothing: padding beyond the base's matrix
    tags: re.Pattern[str] = _NOTHING  # tags that the template names, such as <think>
    abilities: Abilities = field(default_factory=Abilities)
    closes: re.Pattern[str] = _NOTHING  # what ends an assistant's turn that calls tools

    @property
    def end_is_token(self) -> bool:
        """Return whether turns end with a control token; the newline of `plain` may be part of the answer's last token."""
        return self.name not in FORMATS or bool(FORMATS[self.name].needs)

    def encode(self, record: Record, max_length: int | None = None) -> Encoded:
        """Encode the whole conversation. An answer's leading white space is dropped where the prompt would swallow it.

        With a `max_length`, last rounds that are far too long to fit are neither rendered nor tokenised, and leave no ids. Raises
        `RecordError` if the template cannot express the record, nothing is learned, or an unknown token would be learned;
        `TooLongError` if not even the first round can fit.
        """
        return all_steps(self.encoding(record, max_length))

    def encoding(self, record: Record, max_length: int | None = None) -> Steps[Encoded]:
        """Encode as `encode` does, step by step."""
        messages = self.messages(record)
        trimmed = first_rounds(record, self._kept(record, messages, max_length))
        row = yield from self._encode(trimmed, messages if trimmed is record else self.messages(trimmed), media_kinds(record))
        ends = round_ends(row)
        if trimmed is not record:
            if not row.rendering.first_round_apart:
                reason = f"its rounds, which go together in this template, take more than {max_length} tokens"
                raise self._too_long(record, reason, max_length)
            ends = ends[:-1]  # without the round that stands in for the dropped ones
        ids, supervised = row.tokens.ids[: ends[-1]], row.supervised[: ends[-1]]
        if not any(supervised) and trimmed is not record:
            raise self._too_long(record, "no round that fits has an answer to learn", max_length)
        if not any(supervised):
            raise RecordError(record.where, record.id, "conversations", "no token is supervised")
        unknown = self.tokenizer.unk_token_id
        if unknown in ids and unknown not in self.stop_ids and any(s and i == unknown for i, s in zip(ids, supervised)):
            reason = f"an answer holds what the tokenizer only knows as {self.tokenizer.unk_token}"
            raise RecordError(record.where, record.id, "conversations", reason)
        num_rounds = len(ends) if trimmed is record else len(round_starts([turn.role for turn in record.turns]))
        return Encoded(ids, supervised, ends, num_rounds, row.rendering.removed, row.rendering)

    def prompt(self, record: Record, like: Turn | None = None) -> list[int]:
        """Return the ids up to where an answer (`like` the given one: with a thought or without) to the last turn starts."""
        return self.prompt_of(self.answered(record, like)).ids

    def prompt_of(self, row: Rendering) -> Tokens:
        """Tokenise a rendering up to where its last answer starts, whatever the answer is."""
        cut = row.spans[-1].prompt  # not a generation prompt: some templates write more before an answer than that says
        return self._tokenize(row.text[:cut], [pair for pair in row.written if pair[1] <= cut])

    def answered(self, record: Record, like: Turn | None = None) -> Rendering:
        """Render the record with a short answer to its last turn. Raises `RecordError`."""
        record = replace(record, turns=(*record.turns, Turn("assistant", "x") if like is None else shortened_turn(like, self.tags)))
        return all_steps(self._encode(record, self.messages(record), media_kinds(record))).rendering

    def messages(self, record: Record) -> list[Message]:
        """Return the turns in the form that the template reads. Raises `RecordError` for what it does not write."""
        messages = write_messages(record, self._wording)
        if key := next((key for message in messages if (key := self.abilities.lacking(message))), ""):
            what = "turns of tools" if key == "tool" else "them"
            reason = f"the chat template does not render {what}; remove them or take another template"
            raise RecordError(record.where, record.id, key, reason)
        return [self.abilities.express(message) for message in messages]

    def fitting(self, record: Record, max_length: int) -> Record:
        """Return the record without last rounds that are far too long. Raises `TooLongError` if the first one cannot fit."""
        return first_rounds(record, self._kept(record, self.messages(record), max_length), whole=False)

    def _kept(self, record: Record, messages: list[Message], max_length: int | None) -> int | None:
        """Return how many rounds can fit; None for all. Raises `TooLongError` if none can."""
        if max_length is None:
            return None
        if (kept := rounds_that_may_fit(self.tokenizer, messages, record.tools, self.abilities, self.tags, max_length)) == 0:
            raise self._too_long(record, f"the first round takes more than {max_length} tokens", max_length)
        return kept

    def _encode(self, record: Record, messages: list[Message], kinds: tuple[str, ...]) -> Steps[Row]:
        """Render and tokenise the messages; answers whose start merges with the prompt lose white space or begin late."""
        late: set[int] = set()
        try:
            for _ in range(3):
                rendering, tail = self._render(record, messages, kinds, late)
                yield
                tokens = self._tokenize(rendering.text, rendering.written)
                yield
                supervised, glued = supervise(rendering.spans, tokens, self.control_ids)
                if not glued:
                    break
                for i in glued:
                    content = messages[i]["content"] or ""
                    if content[:1].isspace():
                        messages[i] = {**messages[i], "content": content.lstrip()}
                    else:
                        late.add(i)
            else:
                raise RenderError("an answer's first token holds the end of its prompt")
        except RenderError as error:
            raise RecordError(record.where, record.id, error.field, str(error)) from None
        row = Row(rendering, tail, tokens, supervised)
        check_row(record, row, self.tokenizer, self.control_ids, self.placeholder_ids, self.unread)
        return row

    def _render(self, record: Record, messages: list[Message], kinds: tuple[str, ...], late: set[int]) -> tuple[Rendering, str]:
        """Return rendering and tail. An interrupted answer ends the text: no token says that it is over (VITA `end_tag`)."""
        found = self._renderer.render(messages, [turn.learn for turn in record.turns], kinds, record.tools, frozenset(late))
        last = found.spans[-1]
        tail = found.text[last.end :]
        if record.interrupted and last.role == "assistant":
            check_cut(messages[-1], self.tags)
            spans = [*found.spans[:-1], replace(last, end=last.stop)]
            return replace(found, text=found.text[: last.stop], spans=spans), tail
        return found, tail

    @cached_property
    def _wording(self) -> Wording:
        parts, only = takes_parts(self.source), self.name in FORMATS and FORMATS[self.name].placeholders_only
        return Wording(self.name, self.placeholders, () if parts else self.media_wrap, self.state_tokens, self.tokens, only, parts)

    @property
    def layouts(self) -> TextLayouts:
        return self._renderer.layouts

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.source, self.ends, self.closes, self.written, self.tags)

    def _tokenize(self, text: str, written: Sequence[tuple[int, int]]) -> Tokens:
        """Tokenise a rendering, with BOS as the tokenizer would put it: as an id, for as text it changes what follows in some."""
        tokens = tokenize(self.tokenizer, text, written, len(self.lead))
        if not self.lead:
            return tokens
        return Tokens([self.tokenizer.convert_tokens_to_ids(self.lead), *tokens.ids], [(0, len(self.lead)), *tokens.offsets])

    def _too_long(self, record: Record, reason: str, max_length: int | None) -> TooLongError:
        return TooLongError(record.where, record.id, "conversations", f"{reason}, data.max_length is {max_length}")


@dataclass(frozen=True)
class TemplateOptions:
    """Settings of a template that do not come from its name or its tokenizer."""

    placeholders: str = "as_written"  # data.placeholders
    media_wrap: tuple[str, ...] = ()  # data.media_wrap
    allowed: Sequence[str] = ()  # control tokens that contents may use, as configured new tokens
    state_tokens: str = "none"  # data.state_tokens
    unread: frozenset[int] = frozenset()  # ids that no record may hold
    system: str = ""  # text of conversations without one
    answer_end: str = ""  # data.answer_end
    tokens: Mapping[str, str] = field(default_factory=lambda: DEFAULT_TOKENS)  # by modality, whose positions take features


def load_template(name: str, tokenizer: PreTrainedTokenizerFast, options: TemplateOptions = TemplateOptions()) -> Template:
    """Load template `name` for `tokenizer`, and try it on a short conversation.

    Of `options.allowed`, what template and tokenizer need stays text. Raises `ConfigError` if the tokenizer lacks what is needed.
    """
    media_wrap, allowed, state_tokens, tokens = options.media_wrap, options.allowed, options.state_tokens, options.tokens
    needs = needed_tokens(name, tokenizer)
    check_state_tokens(tokenizer, state_tokens)
    lead = lead_token(tokenizer) if name in FORMATS else ""
    source = with_system_text(named_source(name, lead, tokenizer, tokens, media_wrap, options.answer_end), options.system)
    written, in_contents = content_tokens(source, tokens, media_wrap), () if takes_parts(source) else media_wrap
    free = {*PLACEHOLDERS.values(), *written.values(), *allowed, *STATE_TOKENS[state_tokens].values(), *thought_tags(source)}
    free = free - {*needs, *tokenizer.special_tokens_map.values()} | {*written.values()}
    special = special_ids(tokenizer, free - template_tokens(tokens, written, in_contents))
    control = "|".join(map(re.escape, special)) or "(?!)"
    known = tokenizer.get_vocab()
    template = Template(
        name=name,
        source=source,
        tokenizer=tokenizer,
        placeholders=options.placeholders,
        media_wrap=tuple(media_wrap),
        lead=lead,
        ends=re.compile(re.escape(FORMATS[name].end) if name in FORMATS else control),
        written=written_pattern([*special], wrapped_placeholder(written, in_contents)),
        control_ids=frozenset(special.values()) - unknown_only_id(tokenizer),
        placeholder_ids={modality: known[token] for modality, token in sorted(tokens.items()) if token in known},
        tokens=written,
        allowed=tuple(allowed),
        state_tokens=state_tokens,
        unread=options.unread,
        system=options.system,
        tags=tags_of(source, re.compile(f"{re.escape(written['image'])}|{control}" if in_contents else control)),
        abilities=find_abilities(lambda messages: apply(tokenizer, source, messages)),
    )
    return _with_ends(template)


def _with_ends(template: Template) -> Template:
    """Return the template with what ends its answers and its tool calls, as short conversations show it, and the EOS id."""
    try:
        end = last_id(template._renderer, template.lead, template.control_ids)
    except RenderError as error:
        raise ConfigError(f"data.template = {template.name!r} cannot be used with this tokenizer: {error}") from error
    if end is None:
        raise ConfigError(f"data.template = {template.name!r} leaves nothing to learn with this tokenizer")
    tokenizer, found = template.tokenizer, [end]
    if template.name not in FORMATS:
        template = replace(template, closes=re.compile(re.escape(tokenizer.convert_ids_to_tokens(end))))
    called = closing_id(template._renderer, template.abilities)
    if called is not None and called != end:
        found.append(called)
        closes = "|".join(re.escape(tokenizer.convert_ids_to_tokens(id)) for id in found)
        template = replace(template, closes=re.compile(closes))
    eos = tokenizer.eos_token_id
    return replace(template, stop_ids=tuple(dict.fromkeys([*found, *([] if eos is None else [eos])])))
