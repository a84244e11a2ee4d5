"""Pairs of tokenizer and template, and records for them: long ones, or drawn from pieces that templates treat specially."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from data.records.record import Record, Turn, parse

AUTO = ["qwen", "qwen3", "llama3", "mistral", "mistral3", "phi3"]


PAIRS = [
    *((name, "auto") for name in AUTO),
    *((name, "chatml") for name in ("qwen", "bytes", "bytes_bos")),
    *itertools.product(("llama", "llama_first", "llama_always", "bytes", "bytes_bos"), ("vicuna_v1", "llama2", "mistral", "plain")),
    ("qwen", "plain"),
    *((name, name) for name in ("llama3", "gemma", "phi3", "internlm2")),
    *(("qwen", "mpt"), ("qwen", "vita_qwen"), ("llama", "vita_mixtral"), ("llama_first", "vita_mixtral")),
]


PIECES = [
    "A cat",
    "cat",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "🙂",
    "👨‍👩‍👧",
    "漢字",
    "cafe\u0301",
    "USER: ",
    "ASSISTANT:",
    "assistant\n",
    "user",
    "12 3",
]


CONTROLS = ["[INST]", "</s>", "<s>", "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|end|>", "</s>\n"]


def contents(pieces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), min_size=1, max_size=5).map("".join)


@st.composite
def records(draw: st.DrawFn, name: str, controls: bool) -> Record:
    pieces = PIECES + (CONTROLS if controls else [])
    rounds = 1 if name == "plain" else draw(st.integers(1, 5))
    turns = [{"from": "system", "value": draw(contents(pieces))}] if name != "plain" and draw(st.integers(0, 4)) == 0 else []
    for _ in range(rounds):
        turns.append({"from": "human", "value": draw(contents([*pieces, "<image>", "<image>\n"]))})
        turns.append({"from": "gpt", "value": draw(contents(pieces)) + draw(st.sampled_from(["A cat", "a", "猫."]))})
    if name == "plain" and "<image>" not in turns[0]["value"]:
        turns[0]["value"] += "<image>"
    images = ["a.png"] * sum(turn["value"].count("<image>") for turn in turns)
    return parse({"id": "r", "image": images, "conversations": turns}, "f.json:1")


def talk(num_rounds: int, question: str = "What is this?", answer: str = "A cat sits on a mat.") -> Record:
    turns = [turn for k in range(num_rounds) for turn in (Turn("user", f"{question} {k}"), Turn("assistant", f"{answer} {k}"))]
    return Record("r", tuple(turns), (), "f.json:7")
