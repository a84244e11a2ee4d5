"""Tokenizers of every kind the trainer meets, made in the process: small vocabularies, real pipelines and chat templates."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is this? ASSISTANT: A cat sits on a mat.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "system user assistant model human [INST] <<SYS>> What colour is the car in the picture? It is red.",
    "one two  three\nfour\n\nfive 1 2 3 456",
] * 4

QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] != 'system' %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# Qwen's own, but for the texts about tools: thoughts before the last question are taken out, the last answer gets an empty one.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- set answer = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if ns.multi_step_tool and message.role == "user" and not answer %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{% endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{% endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}{%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in turns %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""
PHI3 = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}
    {{- '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
INTERNLM2 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _wrap(tokenizer: Tokenizer, special: tuple[str, ...], **named: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)


def _bos(tokenizer: Tokenizer, token: str) -> None:
    pair = (token, tokenizer.token_to_id(token))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[pair])


def byte_level(special: tuple[str, ...], bos: str = "", qwen_split: bool = True) -> Tokenizer:
    """GPT-2's bytes; with `qwen_split` newlines are cut as Qwen 2 and Llama 3 cut them, so that they can merge."""
    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        if qwen_split
        else r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "\n\n x\n\n y"] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if bos:
        _bos(tokenizer, bos)
    return tokenizer


def sentence_piece(kind: str) -> Tokenizer:
    """Llama's BPE with bytes to fall back to. `kind`: prepend (legacy), first or always (Metaspace)."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    alphabet = [chr(c) for c in range(33, 127)] + ["\u2581"]
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator([" " + line.replace("\n", " ") for line in CORPUS], trainer)
    state = json.loads(trained.to_str())
    state["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, None  # type: ignore[assignment]
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    _bos(tokenizer, "<s>")
    return tokenizer


@cache
def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of `NAMES`, with <image> added. Shared: tests do not change it."""
    tokenizer = NAMES[name]()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def _qwen(template: str = QWEN) -> PreTrainedTokenizerFast:
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _wrap(byte_level(_CHATML_TOKENS), (), chat_template=template, **named)


def _llama3() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(_LLAMA3_TOKENS, bos="<|begin_of_text|>")
    return _wrap(tokenizer, (), chat_template=LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def _llama(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _wrap(sentence_piece(kind), (), chat_template=template, **named)


def _mistral3() -> PreTrainedTokenizerFast:
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _wrap(sentence_piece("always"), ("[INST]", "[/INST]"), chat_template=MISTRAL, **named)


def _phi3() -> PreTrainedTokenizerFast:
    tokenizer = sentence_piece("prepend")
    roles = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=True) for t in roles])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return _wrap(tokenizer, ("<|endoftext|>",), chat_template=PHI3, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>")


def _gemma() -> PreTrainedTokenizerFast:
    """SentencePiece that puts no space before a text, with a BOS of its own."""
    tokenizer = sentence_piece("prepend")
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    _bos(tokenizer, "<bos>")
    return _wrap(tokenizer, (), chat_template=GEMMA, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def _internlm2() -> PreTrainedTokenizerFast:
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _wrap(sentence_piece("prepend"), _CHATML_TOKENS[1:], chat_template=INTERNLM2, **named)


def _gpt2(bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level with Llama's names for the control tokens and no chat template."""
    tokenizer = byte_level(("<s>", "</s>", *_CHATML_TOKENS), bos="<s>" if bos else "", qwen_split=False)
    return _wrap(tokenizer, (), bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """Unigram with "</s>" among its pieces: plain text can come out as a control token."""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((c, -5.0) for c in ["\u2581", *map(chr, range(33, 127))])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    special = ("<unk>", "<s>", "</s>", "<image>")
    return _wrap(tokenizer, special, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


NAMES = {
    "qwen": _qwen,
    "qwen3": lambda: _qwen(QWEN3),
    "llama3": _llama3,
    "mistral": lambda: _llama("prepend", MISTRAL),
    "mistral3": _mistral3,
    "phi3": _phi3,
    "gemma": _gemma,
    "internlm2": _internlm2,
    "llama": lambda: _llama("prepend"),
    "llama_first": lambda: _llama("first"),
    "llama_always": lambda: _llama("always"),
    "bytes": lambda: _gpt2(bos=False),
    "bytes_bos": lambda: _gpt2(bos=True),
}
