"""Helpers of tests/data/test_formats.py that other tests share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerFast

from data.config import SourceConfig
from data.index.record_index import RecordIndex
from data.records.record import Record, parse
from data.text.template import Template, TemplateOptions, load_template
from tests.support.tiny_tokenizers import NAMES

# A tokenizer for each format, and what ends a turn there.
FITTING = {
    "chatml": ("bytes", "<|im_end|>"),
    "gemma": ("gemma", "<end_of_turn>"),
    "internlm2": ("internlm2", "<|im_end|>"),
    "llama2": ("llama", "</s>"),
    "llama3": ("llama3", "<|eot_id|>"),
    "mistral": ("llama_first", "</s>"),
    "mpt": ("bytes_bos", "<|im_end|>"),
    "phi3": ("phi3", "<|end|>"),
    "plain": ("llama", ""),
    "vicuna_v1": ("llama", "</s>"),
    "vita_mixtral": ("llama", "</s>"),
    "vita_qwen": ("qwen", "<|im_end|>"),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """That of `tiny_tokenizers`, with placeholders of both modalities."""
    made = NAMES[name]()
    made.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<image>", "<audio>")], special_tokens=True)
    return made


@cache
def template(name: str, of: str = "", **options: Any) -> Template:
    return load_template(name, tokenizer(of or FITTING[name][0]), TemplateOptions(**options))


def talk(*values: str, **extra: Any) -> Record:
    """A record of `values`, said in turn; a first one in capitals is the system's. Media follow from the placeholders."""
    system = [{"from": "system", "value": values[0]}] if values[0].isupper() else []
    rest = values[len(system) :]
    turns = system + [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(rest)]
    media = {kind: [f"{kind}{k}" for k in range("".join(values).count(f"<{kind}>"))] for kind in ("image", "video", "audio")}
    return parse({"id": "r", "conversations": turns, **media, **extra}, "f.json:7", needs_answer=len(rest) % 2 == 0)


def text(made: Template, record: Record) -> str:
    return made.tokenizer.decode(made.encode(record).input_ids, skip_special_tokens=False)


def index_of(folder: Path, rows: list[Any]) -> RecordIndex:
    (folder / "rows.json").write_text(json.dumps(rows))
    opened: RecordIndex = RecordIndex.open(SourceConfig(str(folder / "rows.json")), folder, {})
    return opened
