"""A run's adapter as a PEFT folder: for the bare language model, or for the language model inside an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from data.processor import Processor, load_processor
from data.text.tokenizer import save_tokenizer
from model.exports.hf_classes import HfClass, choose_class
from model.exports.llm_folder import why_own_base, write_llm
from model.exports.trained_files import adapter_tensors, write_file
from model.files.tensor_files import Tensors
from model.load import load_model
from model.lora import is_adapter, merge_rows
from model.weights.peft_adapter import WEIGHTS, adapter_config, peft_name, write_config
from tools.exports.hf_folder import class_differences, facts_of, pipeline_of, write_folder
from tools.exports.hf_inputs import their_inputs
from tools.exports.proofs import batch_of, check_close, in_float32, logits, reopened, sample
from tools.exports.task import Exported, ExportTask, python_line

INSIDE = "model.language_model."
"""Place of the decoder inside classes of transformers since version 4.52, unless their files on the hub have it elsewhere."""


def to_peft(task: ExportTask) -> Exported:
    """Write a PEFT adapter folder for the language model, with the model it belongs to if an earlier run trained that, or if
    the run's base is a whole published model.

    With --inside hf: for the language model inside base/, a folder as --for hf writes it, but without the adapter.
    """
    if task.inside == "hf":
        return _inside_hf(task)
    source, card, named = task.source, task.card, task.out
    tensors = adapter_tensors(source, card)
    paths = _paths(tensors)
    base, notes = card.model.llm.path, []
    if reason := why_own_base(source, card):
        base = str(named / "base")
        (task.folder / "base").mkdir()
        write_llm(load_model(source, merge_lora=False), task.folder / "base", card)
        save_tokenizer(load_processor(source).tokenizer, task.folder / "base")
        notes.append(f"{reason}; the language model without the adapter stands in {base}, where the adapter belongs")
    elif card.quantize.bits != 16:
        notes.append(f"the adapter was trained beside {base} in {card.quantize.bits} bits: load that so, or use tools.merge_lora")
    if base == card.model.llm.path and card.vocabulary.new_ids:
        notes.append(f"not in an adapter: {len(card.vocabulary.new_ids)} new rows of the vocabulary ({', '.join(card.tokens)})")
    if others := sorted(name for name, part in card.model.parts().items() if name != "llm" and part.tune != "frozen"):
        notes.append(f"not exported: {', '.join(others)}, which the bare language model has not; --inside hf keeps them")
    write_file(task.folder / WEIGHTS, {peft_name(name, paths): rows for name, rows in tensors.items()})
    write_config(task.folder, adapter_config(card.lora, base, paths))
    line = python_line(
        "from peft import PeftModel; from transformers import AutoModelForCausalLM as M; "
        f"PeftModel.from_pretrained(M.from_pretrained({base!r}), {task.literal()})"
    )
    return Exported(line, f"a PEFT adapter of the language model {base}", "peft", "text-generation", tuple(notes))


def _inside_hf(task: ExportTask) -> Exported:
    source, card, processor = task.source, task.card, load_processor(task.source)
    found = adapter_tensors(source, card)
    target = choose_class(card, facts_of(processor))
    model, base = load_model(source, merge_lora=False), task.folder / "base"
    base.mkdir()
    write_folder(base, target, card, model, processor)
    inner, place = model.llm.base_model_prefix, dict(target.llm).get("model.", INSIDE)
    tensors = {_inside(name, str(inner), place): rows for name, rows in found.items()}
    paths = _paths(tensors)
    difference = prove_inside(base, target, tensors, card.lora.scale, model, processor)
    write_file(task.folder / WEIGHTS, {peft_name(name, paths): rows for name, rows in tensors.items()})
    write_config(task.folder, adapter_config(card.lora, str(task.out / "base"), paths))
    print(f"reopened with transformers: ids and media equal, logits with the adapter within {difference:.1e} of the largest")
    rank = next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= min(card.lora.rank, 512))
    print(f"serve: vllm serve {task.quoted('base')} --enable-lora --max-lora-rank {rank} --lora-modules tuned={task.quoted()}")
    line = python_line(
        f"from peft import PeftModel; from transformers import {target.name} as M; "
        f"PeftModel.from_pretrained(M.from_pretrained({task.literal('base')}), {task.literal()})"
    )
    notes = (
        "base/ holds every other part as it was trained, and the language model without the adapter",
        *class_differences(target, card),
    )
    return Exported(line, f"a PEFT adapter of the model in base/ ({target.name})", "peft", pipeline_of(target), notes)


def _inside(name: str, inner: str, place: str) -> str:
    """Return our name of an adapter's tensor, with the path of its module as in the exported class after `llm.`."""
    return f"llm.{place}{name.removeprefix('llm.').removeprefix(f'{inner}.')}"


def _paths(tensors: Tensors) -> list[str]:
    return [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]


def prove_inside(base: Path, target: HfClass, tensors: Tensors, scale: float, model: Any, processor: Processor) -> float:
    """Open `base` with transformers, add the adapter to the modules that it names, and compare with the unmerged model.

    Returns the largest relative difference of float32 logits. Raises ProofError where ids, media or logits differ.
    """
    with sample(processor) as record:
        batch = batch_of(processor, record)
        inputs = their_inputs(base, target, record, batch, processor)
    theirs = reopened(getattr(transformers, target.name), base)
    places = {f"llm.{name}": parameter for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for name, rows in tensors.items():
            if name.endswith(".lora_A"):
                path = name.removesuffix(".lora_A")
                weight = places[f"{path}.weight"]
                weight.copy_(merge_rows(weight, rows.all(), tensors[f"{path}.lora_B"].all(), scale))
            elif not is_adapter(name):
                places[name].copy_(rows.all())
        found = theirs(**inputs).logits[0]
    return check_close(found, logits(in_float32(model), batch), f"{target.name} with the adapter, and this model")
