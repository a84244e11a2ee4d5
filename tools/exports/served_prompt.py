"""The prompt that a served model gets, compared with the one that its answers were trained behind."""

from __future__ import annotations

from collections.abc import Iterator

from data.processor import Processor
from data.records.record import parse
from data.text.chat_formats import FORMATS

_ASKED: list[dict[str, str]] = [{"role": "user", "content": "x"}]
_SHOWN = 24
"""Characters of the end of a prompt that the note shows."""


def prompt_notes(processor: Processor) -> Iterator[str]:
    """Yield a note where the chat template's generation prompt is not what stood before the answers in training.

    Such templates come from the hub: they write one text before an answer of a conversation and another one before an answer that
    is still to come. Who serves the folder by its template asks otherwise than training did; tools.chat does not.
    """
    template, tokenizer = processor.template, processor.tokenizer
    if template.name in FORMATS:  # they ask as they answer; `plain` has no question without a medium
        return
    trained = template.prompt(parse({"messages": _ASKED}, "prompt:1", needs_answer=False))
    text = tokenizer.apply_chat_template(_ASKED, chat_template=template.source, add_generation_prompt=True, tokenize=False)
    served = tokenizer(text, add_special_tokens=False)["input_ids"]
    if served != trained:
        ends = (repr(tokenizer.decode(ids)[-_SHOWN:]) for ids in (trained, served))
        yield "answers were trained behind {}, the chat template's generation prompt ends with {}: answers may differ".format(*ends)
