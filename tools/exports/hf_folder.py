"""A run as a folder for `LlavaForConditionalGeneration` and `AutoProcessor`, reopened with transformers and compared."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from data.processor import Processor
from data.text.tokenizer import pad_id, save_tokenizer
from model.batch import Batch
from model.card import ModelCard
from model.errors import ConfigError
from model.exports.hugging_face import model_config, processor_files, weights, write_weights
from model.files.tensor_files import dump_json
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS, image_spec
from model.multimodal import MultimodalLM
from model.vision.normalise import normalised
from tools.exports.proofs import batch_of, check_close, in_float32, logits, sample
from trainer.errors import ProofError

PLACEHOLDER = PLACEHOLDERS["image"]


def write_folder(folder: Path, card: ModelCard, model: MultimodalLM, processor: Processor) -> None:
    """Write config.json, weights, processor and tokenizer files. `model` is merged, in the dtype that is written.

    Raises ConfigError if the run cut pictures into tiles.
    """
    spec, fit, template = image_spec(card.specs), processor.config.image_fit, processor.template
    if fit in ("tiles", "anyres"):
        raise ConfigError(
            f"cannot be written for LlavaForConditionalGeneration: data.image_fit = {fit!r}, its processor has one view"
        )
    files = {
        "config.json": model_config(card, model, template.placeholder_ids["image"]),
        "generation_config.json": {"eos_token_id": list(processor.stop_ids), "pad_token_id": pad_id(processor.tokenizer)},
        **processor_files(spec, fit, PLACEHOLDER),
    }
    for name, value in files.items():
        (folder / name).write_text(dump_json(value))
    save_tokenizer(processor.tokenizer, folder, chat_template=for_parts(processor))
    config = folder / "tokenizer_config.json"
    extra = {"additional_special_tokens": [PLACEHOLDER]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **extra}, indent=2, ensure_ascii=False) + "\n")
    write_weights(folder, weights(card, model))


def for_parts(processor: Processor) -> str:
    """Return the run's chat template for contents as transformers users write them: lists of parts, or strings with `<image>`.

    Both become the string that training rendered: parts on lines of their own, pictures first or as written, wrapped.
    """
    template = processor.template
    before, after = template.media_wrap or ("", "")
    image, wrapped = json.dumps(PLACEHOLDER), json.dumps(before + PLACEHOLDER + after)
    first = f"(({image} + '\\n') * (text.split({image}) | length - 1) + text.replace({image}, '') | trim) | trim"
    arranged = first if template.placeholders == "first" else "text"
    return (
        "{%- set flat = namespace(messages=[], lines=[]) -%}{%- for message in messages -%}"
        "{%- if message['content'] is string -%}{%- set text = message['content'] -%}{%- else -%}"
        "{%- set flat.lines = [] -%}{%- for part in message['content'] -%}"
        f"{{%- set flat.lines = flat.lines + [part['text'] if part['type'] == 'text' else {image}] -%}}"
        "{%- endfor -%}{%- set text = flat.lines | join('\\n') -%}{%- endif -%}"
        f"{{%- if {image} in text -%}}{{%- set text = {arranged} -%}}"
        f"{{%- set text = text.replace({image}, {wrapped}) -%}}{{%- endif -%}}"
        "{%- set flat.messages = flat.messages + [dict(message, content=text)] -%}"
        "{%- endfor -%}{%- set messages = flat.messages -%}"
    ) + template.source


def prove_folder(folder: Path, model: MultimodalLM, processor: Processor) -> float:
    """Open `folder` with transformers and compare ids, pixels and logits on a sample.

    Both models run in float32 on the weights that were written. Returns the largest relative difference of the logits. Raises
    ProofError where ids, pixels or logits differ.
    """
    with sample(processor) as record:
        batch = batch_of(processor, record)
        inputs = _inputs(folder, record, batch, processor)
    expected = logits(in_float32(model), batch)
    theirs, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names and kind != "error_msgs"}
    if wrong:
        raise ProofError(f"transformers does not load every tensor of the export: {wrong}")
    with torch.no_grad():
        found = theirs.eval()(**inputs).logits[0]
    return check_close(found, expected, "LlavaForConditionalGeneration and this model")


def _inputs(folder: Path, record: Json, batch: Batch, processor: Processor) -> Json:
    reader = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
    if inputs["input_ids"].tolist() != batch.input_ids.tolist():
        raise ProofError(f"AutoProcessor gives other ids: {inputs['input_ids'].tolist()} and not {batch.input_ids.tolist()}")
    values = batch.media["image"].values
    seen = normalised(values, image_spec(processor.specs), torch.float32)
    if not torch.allclose(inputs["pixel_values"], seen, rtol=0, atol=1e-6 if values.dtype == torch.uint8 else 0):
        raise ProofError("AutoProcessor gives other pixels than training saw")
    return dict(inputs)
