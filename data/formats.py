"""Chat formats of our own: Jinja texts that write what the systems they come from write, to the character."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    source: str  # Jinja, without the token a tokenizer puts before a text by itself
    end: str  # ends an assistant's turn
    needs: tuple[str, ...]  # must be single tokens
    placeholders_only: bool = False  # the user's words are thrown away


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
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

# The system text stands inside the first [INST]; SEP is written before every later one.
_INST = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}
{%- set system = SYSTEM %}{% set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{%- if not loop.first %}{{ SEP }}{% endif %}
{{- '[INST] ' }}
{%- if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}
{{- message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}
{%- endfor %}"""

_PLAIN = """\
{%- for message in messages %}
{{- message['content'] }}{% if message['role'] == 'assistant' %}{{ '\\n' }}{% endif %}
{%- endfor %}"""


def _with(source: str, **values: str) -> str:
    """The source with its constants set first; Jinja has no other place for them that a reader of the file sees."""
    return "".join(f'{{%- set {name} = "{value}" %}}' for name, value in values.items()) + source


FORMATS = {
    "chatml": Format(_CHATML, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "vicuna_v1": Format(_with(_VICUNA, SYSTEM=_VICUNA_SYSTEM), "</s>", ("</s>",)),  # LLaVA conv_vicuna_v1
    "llama2": Format(_with(_INST, SYSTEM=_LLAMA2_SYSTEM, SEP="<s>"), "</s>", ("<s>", "</s>")),  # LLaVA conv_llava_llama_2
    "mistral": Format(_with(_INST, SYSTEM="", SEP=""), "</s>", ("</s>",)),  # LLaVA mistral_instruct
    "plain": Format(_PLAIN, "\n", (), placeholders_only=True),  # LLaVA conv_llava_plain
}

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
    """The template with 26 July 2024, the date Llama 3 falls back to, in place of today's: a row's ids must not age.

    A frozen template stays as it is.
    """
    return _FREEZE + source if "strftime_now" in source and not source.startswith(_FREEZE) else source
