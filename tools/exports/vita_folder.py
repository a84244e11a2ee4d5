"""A run in VITA's own layout, so that its own code serves it: the whole model, its tower and its sound encoder in folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.processor import Processor, load_processor
from model.exports.hf_weights import model_entries, write_weights
from model.exports.internvl import original_tower_config
from model.exports.vita import SOUND, TOWER, check_exportable_vita, tower_processor_file, vita_config, vita_names
from model.exports.vita_sound import band_sums, train_yaml
from model.files.tensor_files import Entry, dump_json
from model.load import load_model
from model.media_spec import PLACEHOLDERS
from model.published.table import part_tensors
from model.vision.tower_kinds import intern_vit
from tools.exports.hf_folder import facts_of
from tools.exports.llava_folder import old_tokenizer
from tools.exports.task import Exported, ExportTask, python_line
from trainer.errors import ProofError

TYPES = {"vita-mixtral": "mixtral-8x7b", "vita-Qwen2": "qwen2p5_instruct", "vita-fo-Qwen2": "qwen2p5_fo_instruct"}
"""VITA's own names of its models, by model_type of config.json."""
OLD = "vita-mixtral"
"""Of VITA 1.0, which reads its tower's config.json by the code beside it."""
CODE = {"AutoConfig": "configuration_intern_vit.InternVisionConfig", "AutoModel": "modeling_intern_vit.InternVisionModel"}
FILES = ("configuration_intern_vit.py", "modeling_intern_vit.py")
START = "model.vision_tower.vision_tower.", "model.audio_encoder."


def to_vita(task: ExportTask) -> Exported:
    """Write a merged folder in VITA's own layout, 1.0 of a Mixtral and 1.5 of a Qwen2, for VITA's own code."""
    card, processor = task.card, load_processor(task.source)
    facts = facts_of(processor)
    check_exportable_vita(card, facts)
    model = load_model(task.source)
    entries = dict(model_entries(model))
    named = vita_names(card, model, entries)
    write_weights(task.folder, named)
    config = vita_config(card, model, facts)
    (task.folder / "config.json").write_text(dump_json(config))
    stops = {"eos_token_id": list(processor.stop_ids), "pad_token_id": card.pad_id}
    (task.folder / "generation_config.json").write_text(dump_json(stops))
    _tokenizer(processor, task.folder, set() if card.model.llm.new_tokens else set(PLACEHOLDERS.values()) & set(card.tokens))
    tower = task.folder / TOWER
    tower.mkdir()
    write_weights(tower, _inside(named, START[0]))
    own = {"auto_map": CODE} if config["model_type"] == OLD else {}
    (tower / "config.json").write_text(dump_json({**original_tower_config(card, config["torch_dtype"]), **own}))
    (tower / "preprocessor_config.json").write_text(dump_json(tower_processor_file(card)))
    if card.model.audio is not None:
        _sound_encoder(task.folder / SOUND, _inside(named, START[1]), train_yaml(card, model), band_sums(card))
    _prove(task.folder, entries, set(card.model.parts()))
    kind, what = config["model_type"], "a whole model in VITA's own layout"
    return Exported(_line(task, kind), what, "transformers", "any-to-any", tuple(_notes(task, kind)))


def _inside(named: dict[str, Entry], start: str) -> dict[str, Entry]:
    return {name.removeprefix(start): entry for name, entry in named.items() if name.startswith(start)}


def _sound_encoder(folder: Path, named: dict[str, Entry], settings: str, statistics: dict[str, Any]) -> None:
    """Write train.yaml, global_cmvn and final.pt, which VITA's code builds the encoder from."""
    folder.mkdir()
    (folder / "train.yaml").write_text(settings)
    (folder / "global_cmvn").write_text(json.dumps(statistics) + "\n")
    torch.save({name: entry.value() for name, entry in named.items()}, folder / "final.pt")


def _tokenizer(processor: Processor, folder: Path, ours: set[str]) -> None:
    """Save the tokenizer without `ours`, our placeholders: VITA has no tokens for media."""
    old_tokenizer(processor, folder)
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text())
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] not in ours]
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    told = json.loads(settings.read_text())
    decoder = told.get("added_tokens_decoder", {})
    told["added_tokens_decoder"] = {number: token for number, token in decoder.items() if token["content"] not in ours}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(told.get(key), list):
            told[key] = [token for token in told[key] if token not in ours]
    settings.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _prove(folder: Path, entries: dict[str, Entry], parts: set[str]) -> None:
    """Read every part of the export as a published model, and compare it with ours. Raises ProofError where a value differs."""
    for part in sorted(parts - {"llm", "state_head"}):
        found = part_tensors("OUT", part, str(folder))
        found = intern_vit(found) if part == "vision" else found
        start = f"{part}.tower." if part in ("vision", "audio") else f"{part}."
        ours = {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
        if differing := [n for n in ours | found if n not in ours or n not in found or not _same(ours[n], found[n].all())]:
            raise ProofError(f"{folder}: {part}: what was read back is not what was written: {sorted(differing)[:3]}")


def _same(entry: Entry, rows: torch.Tensor) -> bool:
    value = entry.value()
    return value is not None and torch.equal(value, rows)


def _line(task: ExportTask, kind: str) -> str:
    code = "from vita.model.builder import load_pretrained_model as load; "
    if kind == OLD:
        call = python_line(f"{code}load('.', None, 'vita', {TYPES[kind]!r})")
    else:
        call = python_line(f"{code}load('.', {TYPES[kind]!r}, {SOUND!r}, {TOWER!r})")
    return f"cd {task.quoted()} && PYTHONPATH=VITA {call}"


def _notes(task: ExportTask, kind: str) -> Iterator[str]:
    yield f"config.json names {TOWER!r} and {SOUND!r}, folders beside it: start VITA there, or write their places into it"
    yield "prompts follow VITA's own conversation: its system text is not the one of data.template"
    if kind == OLD:
        yield f"code is not copied: VITA 1.0 needs {', '.join(FILES)} of a published InternViT in {TOWER!r}"
    if (head := task.card.model.state_head) is not None:
        yield f"its class builds the state head only with predict_usr_state = {head.classes - 1} in its code, which says 0"
