"""The language model of a run alone, as a folder for `AutoModelForCausalLM`, reopened and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.processor import Processor, load_processor
from data.text.tokenizer import save_tokenizer
from model.exports.llm_folder import has_axes, write_llm
from model.load import load_model
from model.multimodal import MultimodalLM
from tools.exports.proofs import check_close, in_float32, reopened
from tools.exports.task import Exported, ExportTask, python_line
from trainer.errors import ProofError

WORDS = "What do you see? A red car, seven trees and 2 dogs."


def to_llm(task: ExportTask) -> Exported:
    """Write the language model alone, adapters merged, as a folder for AutoModelForCausalLM, reopened and compared."""
    model, processor = load_model(task.source), load_processor(task.source)
    write_llm(model, task.folder, task.card)
    save_tokenizer(processor.tokenizer, task.folder, chat_template=processor.template.source)
    difference = prove_llm(task.folder, model, processor)
    print(f"reopened with transformers: ids equal, logits within {difference:.1e} of the largest")
    parts = [part for part in task.card.model.parts() if part != "llm"]
    notes = [f"left out: {', '.join(parts)}; this is the language model alone, for text"] if parts else []
    if has_axes(task.card):
        notes.append(
            "positions of three axes (time, row and column) became one: they are equal for text, and this class has no others"
        )
    line = python_line(
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained({task.literal()}); T.from_pretrained({task.literal()})"
    )
    return Exported(line, "the language model alone, adapters merged", "transformers", "text-generation", tuple(notes))


def prove_llm(folder: Path, model: MultimodalLM, processor: Processor) -> float:
    """Open `folder` with transformers and compare ids and float32 logits of some words.

    Returns the largest relative difference of the logits. Raises ProofError where ids or logits differ.
    """
    expected_ids = processor.tokenizer(WORDS)["input_ids"]
    found_ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(WORDS)["input_ids"]
    if list(found_ids) != list(expected_ids):
        raise ProofError(f"AutoTokenizer gives other ids: {list(found_ids)} and not {list(expected_ids)}")
    theirs = reopened(AutoModelForCausalLM, folder)
    llm: Any = in_float32(model).llm
    ids = torch.tensor([expected_ids])
    with torch.no_grad():
        found, expected = theirs(input_ids=ids).logits[0], llm(input_ids=ids).logits[0].float()
    return check_close(found, expected, "AutoModelForCausalLM and this language model")
