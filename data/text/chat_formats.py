"""Chat formats of our own: Jinja templates that write what the original systems write, character for character.

`llama3`, `gemma`, `phi3` and `internlm2` are the families' own chat templates, for tokenizers that come without one; where a family
writes no system turn of its own, neither do these formats. The token that a tokenizer puts before every text by itself (BOS) is not
part of a format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class ChatFormat:
    """One chat format: its template, and what it needs of a tokenizer."""

    source: str  # Jinja; it may read the variable `media_kinds`, the kinds of media that a record holds
    end: str  # text that ends an assistant's turn
    needs: tuple[str, ...]  # texts that must be single tokens of the tokenizer
    placeholders_only: bool = False  # the user's words are dropped, only their placeholders stay


def jinja_file(package: str, name: str) -> str:
    """Return the template in the file `name` of a package, without the line end at its end."""
    return files(package).joinpath(name).read_text(encoding="utf-8").removesuffix("\n")


def _format(name: str, end: str, needs: tuple[str, ...], placeholders_only: bool = False) -> ChatFormat:
    return ChatFormat(jinja_file(__package__, f"formats/{name}.jinja"), end, needs, placeholders_only)


_IM = ("<|im_start|>", "<|im_end|>")
FORMATS = {
    "chatml": _format("chatml", "<|im_end|>", _IM),
    "gemma": _format("gemma", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "internlm2": _format("chatml", "<|im_end|>", _IM),  # ChatML after a BOS, which its tokenizer puts there
    "llama2": _format("llama2", "</s>", ("<s>", "</s>")),  # LLaVA conv_llava_llama_2
    "llama3": _format("llama3", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": _format("mistral", "</s>", ("</s>",)),  # LLaVA mistral_instruct
    "mpt": _format("mpt", "<|im_end|>", _IM),  # LLaVA conv_mpt
    "phi3": _format("phi3", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")),
    "plain": _format("plain", "\n", (), placeholders_only=True),  # LLaVA conv_llava_plain
    "vicuna_v1": _format("vicuna_v1", "</s>", ("</s>",)),  # LLaVA conv_vicuna_v1
    # VITA's three system texts stand in the place and the form of its persona, in words of our own: whoever trains a model chooses
    # its name and maker. To continue from VITA's weights with VITA's words, write those into the records as their system turn. A
    # record with an image takes the text for images, because VITA tests for images first.
    "vita_mixtral": _format("vita_mixtral", "</s>", ("</s>",)),  # VITA mixtral_two
    "vita_qwen": _format("vita_qwen", "<|im_end|>", _IM),  # VITA 1.5 qwen2p5_instruct
}


def with_system_text(source: str, system: str) -> str:
    """Return the template with `system` as the system turn of conversations that have none; unchanged where `system` is ""."""
    turn = "[{'role': 'system', 'content': " + json.dumps(system, ensure_ascii=False) + "}]"
    start = "{%- set messages = messages if messages[0]['role'] == 'system' else " + turn + " + messages +%}"
    return source if not system or start in source else start + source  # a run's own tokenizer has it already


def with_answer_end(source: str, end: str) -> str:
    """Return the template with `end` behind a conversation's last answer, unless it calls tools; unchanged where `end` is ""."""
    last = "messages and messages[-1]['role'] == 'assistant' and not messages[-1]['tool_calls'] and not add_generation_prompt"
    tail = "{% if " + last + " %}{{ " + json.dumps(end, ensure_ascii=False) + " }}{% endif %}"
    return source if not end or source.endswith(tail) else source.removesuffix("\n") + tail  # a run's own tokenizer has it already


# 26 July 2024 by strftime's directives; longer ones first, since they are replaced one after the other.
_FROZEN = {
    **{"%-d": "26", "%-m": "7", "%F": "2024-07-26", "%D": "07/26/24", "%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%e": "26"},
    **{"%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%j": "208"},
    **{"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM"},
}
_FREEZE = (
    "{% macro strftime_now(format) %}{% set ns = namespace(text=format) %}"
    "{% for key, value in " + repr(_FROZEN) + ".items() %}{% set ns.text = ns.text | replace(key, value) %}{% endfor %}"
    "{{ ns.text }}{% endmacro %}"
)


def freeze_date(source: str) -> str:
    """Return the template with 26 July 2024 in place of today's date, so that a row's ids do not change from day to day.

    Llama 3 falls back to the same date. A frozen template stays as it is.
    """
    return _FREEZE + source if "strftime_now" in source and not source.startswith(_FREEZE) else source
