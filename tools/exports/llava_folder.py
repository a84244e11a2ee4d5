"""The layouts of LLaVA: its projector's file; for LoRA runs its LoRA folder; for runs that trained more its whole folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from data.processor import Processor, load_processor
from data.text.tokenizer import save_tokenizer
from model.card import ModelCard
from model.exports import llava
from model.exports.hf_text import sizes_of
from model.exports.hf_weights import model_entries, whole_tower, write_weights
from model.exports.llm_folder import why_own_base, write_llm
from model.exports.trained_files import adapter_tensors, changed_parts, projector, write_file
from model.files.tensor_files import dump_json, read_weights
from model.load import load_model
from model.published.table import find_layout
from model.weights.peft_adapter import WEIGHTS, adapter_config, peft_name, write_config
from tools.exports.hf_folder import facts_of
from tools.exports.task import Exported, ExportTask, python_line
from trainer.errors import ProofError

LOAD = "from llava.model.builder import load_pretrained_model as load; "


def to_llava(task: ExportTask) -> Exported:
    """Write LLaVA's own layout: mm_projector.bin; of a run that trained more, its LoRA folder or its whole folder too."""
    llava.check_exportable_llava(task.card)
    changed = changed_parts(task.source, task.card)
    if "llm" in task.card.lora_parts:
        return _lora_folder(task)
    if changed & {"llm", "vision"}:
        return _whole_folder(task)
    path = _projector_file(task)
    line = f"(in LLaVA) python llava/train/train_mem.py --pretrain_mm_mlp_adapter {task.quoted(path.name)} ..."
    return Exported(line, "LLaVA's projector", notes=_left_out(task))


def _projector_file(task: ExportTask, before: str = "", name: str = llava.NAME) -> Path:
    tensors = projector(task.source, task.card)
    path = llava.write_projector(task.folder, tensors, before, name)
    stored = read_weights(path)
    same = [torch.equal(stored[before + llava.projector_name(inner)].all(), rows.all()) for inner, rows in tensors.items()]
    if len(stored) != len(same) or not all(same):
        raise ProofError(f"{path}: what was read back is not what was written")
    return path


def _left_out(task: ExportTask) -> tuple[str, ...]:
    held = {"llm", "vision", "vision_projector"}
    others = [name for name, part in task.card.model.parts().items() if part.tune != "frozen" and name not in held]
    if task.card.model.llm.tune == "new_tokens":
        others.append("llm (new tokens)")
    return (f"not exported: {', '.join(others)}: LLaVA has no place for them",) if others else ()


def _lora_folder(task: ExportTask) -> Exported:
    card, source, folder = task.card, task.source, task.folder
    processor = load_processor(source)
    facts = facts_of(processor)
    llava.check_whole_llava(card, facts, adapts=True)
    base, notes, text = card.model.llm.path, list(_left_out(task)), dict(card.hugging_face["llm"])
    if reason := why_own_base(source, card, opened="LLaVA (original"):
        base = str(task.out / "base")
        (folder / "base").mkdir()
        model = load_model(source, merge_lora=False)
        write_llm(model, folder / "base", card)
        old_tokenizer(processor, folder / "base")
        text = sizes_of(card, model)[0]
        notes.append(f"{reason}; the language model without the adapter stands in {base}, where the adapter belongs")
    tensors = adapter_tensors(source, card)
    paths = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    write_file(folder / WEIGHTS, {peft_name(name, paths): rows for name, rows in tensors.items()})
    write_config(folder, adapter_config(card.lora, base, paths))
    _projector_file(task)
    _projector_file(task, llava.BEFORE_LORA, llava.TRAINED)
    (folder / "config.json").write_text(dump_json(llava.llava_config(card, facts, text)))
    notes += [*_tower_to_name(card), _prompts(processor)]
    line = f"(in LLaVA) {python_line(f'{LOAD}load({task.literal()}, {base!r}, {_name(text, lora=True)!r})')}"
    return Exported(line, f"LLaVA's LoRA folder, beside {base}", "peft", "image-text-to-text", tuple(notes))


def _whole_folder(task: ExportTask) -> Exported:
    card, source, folder = task.card, task.source, task.folder
    processor = load_processor(source)
    facts = facts_of(processor)
    llava.check_whole_llava(card, facts, adapts=False)
    model = load_model(source)
    named = named_tower(card)
    inside = "vision" in changed_parts(source, card) or named is not None
    # LLaVA-NeXT removes SigLIP's last block itself.
    drops = card.hugging_face["vision"]["model_type"] == "siglip_vision_model"
    tower = whole_tower(card, model, dropped=int(drops)) if inside else {}
    write_weights(folder, llava.whole_names(dict(model_entries(model)), tower))
    text, _, _ = sizes_of(card, model)
    config = llava.llava_config(card, facts, text)
    own = {"unfreeze_mm_vision_tower": True, "mm_vision_tower": named or config["mm_vision_tower"]} if inside else {}
    (folder / "config.json").write_text(dump_json(config | own))
    stops = {"eos_token_id": list(processor.stop_ids), "pad_token_id": card.pad_id}
    (folder / "generation_config.json").write_text(dump_json(stops))
    old_tokenizer(processor, folder)
    _projector_file(task)
    line = f"(in LLaVA) {python_line(f'{LOAD}load({task.literal()}, None, {_name(text)!r})')}"
    notes = (*_left_out(task), *(() if named else _tower_to_name(card)), _prompts(processor))
    return Exported(line, "a whole model in LLaVA's own layout", "transformers", "image-text-to-text", notes)


def named_tower(card: ModelCard) -> str | None:
    """Return the tower that a whole model of LLaVA's names, whose own, tuned tower the run started from.

    Returns "" where a whole model of another layout names none, None where the run's tower has a folder of its own.
    """
    vision = card.model.vision
    found = find_layout("model.vision.path", vision.path, card.model.cache_dir) if vision else None
    return None if found is None else str(found[1].config.get("mm_vision_tower", ""))


def _tower_to_name(card: ModelCard) -> tuple[str, ...]:
    """Return what is left to the user where the tower is part of a whole model, out of which LLaVA loads none."""
    vision = card.model.vision
    found = find_layout("model.vision.path", vision.path, card.model.cache_dir) if vision else None
    if vision is None or found is None:
        return ()
    return (
        f"before LLaVA opens it: mm_vision_tower in config.json names {vision.path}, a whole {found[0].name}; write the folder or "
        "hub id of its tower alone there",
    )


def _prompts(processor: Processor) -> str:
    return f"LLaVA writes prompts by its own conv_mode, which no file names: choose the one of template {processor.template.name!r}"


def _name(text: dict[str, object], lora: bool = False) -> str:
    """Return a model name by which LLaVA chooses the class: it looks for words in it."""
    kind = str(text["model_type"]).removeprefix("llava_")
    return "llava" + ("" if kind == "llama" else f"-{kind.removesuffix('2')}") + ("-lora" if lora else "")


def old_tokenizer(processor: Processor, folder: Path) -> None:
    """Save the tokenizer so that the versions that LLaVA pins read it too: merges as texts, where no piece holds a space."""
    save_tokenizer(processor.tokenizer, folder, chat_template=processor.template.source)
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text())
    merges = value["model"].get("merges", [])
    if merges and all(isinstance(pair, list) and not any(" " in piece for piece in pair) for pair in merges):
        value["model"]["merges"] = [" ".join(pair) for pair in merges]
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
