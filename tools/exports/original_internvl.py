"""A run in InternVL's original layout, so that OpenGVLab's own code serves it."""

from __future__ import annotations

import json
from typing import Any

from data.processor import load_processor
from data.text.tokenizer import save_tokenizer
from model.card import ModelCard
from model.exports.hf_classes import INTERN_VL
from model.exports.hf_processors import FLAT, processor_files
from model.exports.hf_weights import model_entries, whole_tower, write_weights
from model.exports.internvl import CODE, CONTEXT, check_exportable_internvl, internvl_config, internvl_names
from model.files.tensor_files import Entry, dump_json
from model.load import load_model
from model.media_spec import image_spec
from model.multimodal import MultimodalLM
from tools.exports.hf_folder import facts_of
from tools.exports.task import Exported, ExportTask, python_line


def to_internvl(task: ExportTask) -> Exported:
    """Write a merged folder in the original layout of InternVLChatModel, for OpenGVLab's own code."""
    card, processor = task.card, load_processor(task.source)
    facts = facts_of(processor)
    check_exportable_internvl(card, facts)
    model = load_model(task.source)
    config = internvl_config(card, model, facts, processor.template.name)
    llm: Any = model.llm
    names = {id(parameter): name for name, parameter in llm.named_parameters()}
    embedding = names[id(llm.get_input_embeddings().weight)]
    write_weights(task.folder, internvl_names(all_entries(card, model), "lm_head.weight", embedding))
    stops = {"eos_token_id": list(processor.stop_ids), "pad_token_id": card.pad_id}
    image = processor_files(INTERN_VL, image_spec(card.specs), facts)[FLAT]
    side = image["size"]
    flat = {**image, "image_processor_type": "CLIPImageProcessor", "crop_size": side["height"], "size": side["height"]}
    for key in ("processor_class", "crop_to_patches", "min_patches", "max_patches"):
        del flat[key]
    for name, value in (("config.json", config), ("generation_config.json", stops), (FLAT, flat)):
        (task.folder / name).write_text(dump_json(value))
    save_tokenizer(processor.tokenizer, task.folder, chat_template=processor.template.source)
    if facts.tokens["image"] != CONTEXT and CONTEXT not in processor.tokenizer.get_vocab():
        rename_token(task, facts.tokens["image"])
    line = python_line(f"from transformers import AutoModel as M; M.from_pretrained({task.literal()}, trust_remote_code=True)")
    files = ", ".join(sorted({f"{place.partition('.')[0]}.py" for place in CODE.values()}))
    notes = (
        f"its code is not copied: put {files} and what they import, from a published InternVL of the same language model, beside",
        f"prompts follow its conversation {config['template']!r}: compare it with template {processor.template.name!r}",
    )
    what = "a whole model in InternVL's original layout"
    return Exported(line, what, "transformers", "image-text-to-text", notes)


def all_entries(card: ModelCard, model: MultimodalLM) -> dict[str, Entry]:
    """Return every tensor of the model by our full name, the whole tower's among them."""
    tower = {f"vision.tower.{name}": entry for name, entry in whole_tower(card, model).items()}
    return {**dict(model_entries(model)), **tower}


def rename_token(task: ExportTask, placeholder: str) -> None:
    """Give the placeholder the name that InternVL's code looks for; its id, and every row of the vocabulary, stay."""
    file = task.folder / "tokenizer.json"
    value = json.loads(file.read_text())
    for token in value["added_tokens"]:
        if token["content"] == placeholder:
            token["content"] = CONTEXT
    vocabulary = value["model"].get("vocab")
    if isinstance(vocabulary, dict) and placeholder in vocabulary:
        vocabulary[CONTEXT] = vocabulary.pop(placeholder)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
