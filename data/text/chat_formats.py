"""Chat formats of our own: Jinja templates that write what the original systems write, character for character.

`llama3`, `gemma`, `phi3` and `internlm2` are the families' own chat templates, for tokenizers that come without one; where a family
writes no system turn of its own, neither do these formats. The token that a tokenizer puts before every text by itself (BOS) is not
part of a format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatFormat:
    """One chat format: its template, and what it needs of a tokenizer."""

    source: str  # Jinja; it may read the variable `media_kinds`, the kinds of media that a record holds
    end: str  # text that ends an assistant's turn
    needs: tuple[str, ...]  # texts that must be single tokens of the tokenizer
    placeholders_only: bool = False  # the user's words are dropped, only their placeholders stay


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
# Stands in the place and the form of VITA's persona, in words of our own: whoever trains a model chooses its name and maker. To
# continue from VITA's weights with VITA's words, write those into the records as their system turn.
_VITA_SYSTEM = (
    "You are an assistant for text, pictures, video and speech. \\n"
    "- Be helpful, honest and harmless. \\n"
    "- Talk with the user fluently, in the language that the user chooses. \\n"
    "- When the user points out a mistake in an answer, apologise and work out the right one together."
)
_VITA_SEEN = " \\n- Answer strictly from what the {0} shows; when the {0} does not show what is asked, say so."

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_MPT = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_VICUNA = """\
{%- if messages[0]['role'] != 'system' %}{{ SYSTEM + ' ' }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + ' ' }}
{%- elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

_SPLIT_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}
{%- set system = SYSTEM %}{% set turns = messages %}
{%- endif %}"""

# The system text stands inside the first [INST]; SEP is written before every later one.
_INST = (
    _SPLIT_SYSTEM
    + """
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{%- if not loop.first %}{{ SEP }}{% endif %}
{{- '[INST] ' }}
{%- if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}
{{- message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}
{%- endfor %}"""
)

_LLAMA3 = """\
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_GEMMA = """\
{%- if messages[0]['role'] == 'system' %}
{{- raise_exception('gemma has no system turn; put its words into the first question') }}
{%- endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else 'user' %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_PHI3 = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"""

_PLAIN = """\
{%- for message in messages %}
{{- message['content'] }}{% if message['role'] == 'assistant' %}{{ '\\n' }}{% endif %}
{%- endfor %}"""

# VITA has three system texts. A record with an image takes the text for images, because VITA tests for images first.
_BY_MEDIA = """\
{%- set kinds = media_kinds | default([]) %}
{%- if 'image' in kinds %}{% set SYSTEM = SYSTEM + IMAGE %}
{%- elif 'video' in kinds %}{% set SYSTEM = SYSTEM + VIDEO %}{% endif %}"""

_VITA_MIXTRAL = """
{{- 'system:' + system + '</s>' }}
{%- for message in turns %}
{{- '\\n' + ('user:' if message['role'] == 'user' else 'bot:') + message['content'] + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\nbot:' }}{% endif %}"""

# No newline after the last turn.
_VITA_QWEN = """
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- for message in turns %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{%- if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def _with(source: str, **values: str) -> str:
    """Return the template with its constants set at the start: Jinja has no other place for them that a reader of the file sees."""
    return "".join(f'{{%- set {name} = "{value}" %}}' for name, value in values.items()) + source


def _vita(source: str) -> str:
    """Return a VITA template with VITA's three system texts."""
    seen = {kind.upper(): _VITA_SEEN.format(kind) for kind in ("image", "video")}
    return _with(_BY_MEDIA + _SPLIT_SYSTEM + source, SYSTEM=_VITA_SYSTEM, **seen)


_IM = ("<|im_start|>", "<|im_end|>")
FORMATS = {
    "chatml": ChatFormat(_CHATML, "<|im_end|>", _IM),
    "gemma": ChatFormat(_GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "internlm2": ChatFormat(_CHATML, "<|im_end|>", _IM),  # ChatML after a BOS, which its tokenizer puts there
    "llama2": ChatFormat(_with(_INST, SYSTEM=_LLAMA2_SYSTEM, SEP="<s>"), "</s>", ("<s>", "</s>")),  # LLaVA conv_llava_llama_2
    "llama3": ChatFormat(_LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": ChatFormat(_with(_INST, SYSTEM="", SEP=""), "</s>", ("</s>",)),  # LLaVA mistral_instruct
    "mpt": ChatFormat(_with(_MPT, SYSTEM=_MPT_SYSTEM), "<|im_end|>", _IM),  # LLaVA conv_mpt
    "phi3": ChatFormat(_PHI3, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")),
    "plain": ChatFormat(_PLAIN, "\n", (), placeholders_only=True),  # LLaVA conv_llava_plain
    "vicuna_v1": ChatFormat(_with(_VICUNA, SYSTEM=_VICUNA_SYSTEM), "</s>", ("</s>",)),  # LLaVA conv_vicuna_v1
    "vita_mixtral": ChatFormat(_vita(_VITA_MIXTRAL), "</s>", ("</s>",)),  # VITA mixtral_two
    "vita_qwen": ChatFormat(_vita(_VITA_QWEN), "<|im_end|>", _IM),  # VITA 1.5 qwen2p5_instruct
}


def with_system_text(source: str, system: str) -> str:
    """Return the template with `system` as the system turn of conversations that have none; unchanged where `system` is ""."""
    turn = "[{'role': 'system', 'content': " + json.dumps(system, ensure_ascii=False) + "}]"
    start = "{%- set messages = messages if messages[0]['role'] == 'system' else " + turn + " + messages +%}"
    return source if not system or start in source else start + source  # a run's own tokenizer has it already


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
