"""A run as a folder for a class of transformers and AutoProcessor, reopened with transformers and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers
from transformers import AddedToken, PreTrainedTokenizerFast

from data.config import DataConfig
from data.media.pixel_budget import clip_budget, rule_of
from data.media.tiling import grids
from data.processor import Processor, load_processor
from data.text.chat_formats import jinja_file
from data.text.parts_template import takes_parts, with_signs_alone
from data.text.tokenizer import pad_id, save_tokenizer
from model.card import ModelCard
from model.exports.hf_classes import GEMMA3, INTERN_VL, NEXT, QWEN2_AUDIO, SMOLVLM, HfClass, choose_class, class_config
from model.exports.hf_pixtral import PROCESSOR
from model.exports.hf_processors import SEES_VIDEOS, named_tokens, processor_files, wraps
from model.exports.hf_weights import weights, write_weights
from model.exports.media_facts import MediaFacts
from model.files.tensor_files import dump_json
from model.files.untrusted import Json
from model.load import load_model
from model.media_spec import PLACEHOLDERS, NativeSpec, image_spec
from model.multimodal import MultimodalLM
from model.published.transformers_glm4v import AROUND as GLM_AROUND
from model.published.transformers_glm4v import TOKENS as GLM_TOKENS
from model.published.transformers_qwen_vl import AROUND
from tools.exports.hf_inputs import their_inputs
from tools.exports.proofs import batch_of, check_close, in_float32, logits, reopened, sample
from tools.exports.served_prompt import prompt_notes
from tools.exports.task import Exported, ExportTask, python_line

CLIP_ENDS = ("<|audio_bos|>", "<|audio_eos|>")
"""Tokens that Qwen2-Audio's chat template writes around a clip."""
PAIRS = (AROUND, GLM_AROUND)
"""Tokens that chat templates write around a picture at its own size."""


def to_hf(task: ExportTask) -> Exported:
    """Write a merged folder for the class of transformers that has these parts, and AutoProcessor, reopened and compared."""
    card, processor = task.card, load_processor(task.source)
    target = choose_class(card, facts_of(processor))
    model = load_model(task.source)
    write_folder(task.folder, target, card, model, processor)
    difference = prove_folder(task.folder, target, model, processor)
    print(f"reopened with transformers ({target.name}): ids and media equal, logits within {difference:.1e} of the largest")
    line = python_line(
        f"from transformers import AutoProcessor as P, {target.name} as M; "
        f"M.from_pretrained({task.literal()}); P.from_pretrained({task.literal()})"
    )
    what = f"a whole model for transformers' {target.name}, adapters merged"
    notes = (*class_differences(target, card), *budget_differences(processor.config), *prompt_notes(processor))
    return Exported(line, what, "transformers", pipeline_of(target), notes)


def pipeline_of(target: HfClass) -> str:
    """Return the pipeline_tag of a class."""
    return "audio-text-to-text" if target.modality == "audio" else "image-text-to-text"


def class_differences(target: HfClass, card: ModelCard) -> Iterator[str]:
    """Yield what the class makes of some inputs otherwise than training did."""
    if target is NEXT:
        yield "several pictures in one conversation: training saw one view of each, this class cuts each into tiles"
    if target is INTERN_VL:
        yield "several pictures in one conversation: training shared data.max_tiles among them, this class gives each of them all"
    if target in SEES_VIDEOS:
        needs = "torchvision and num2words" if target is SMOLVLM else "torchvision"
        yield f"AutoProcessor of this class needs {needs}, for videos"
    if target.processor == PROCESSOR:
        yield "AutoProcessor of this class needs torchvision"
    if target is QWEN2_AUDIO:
        yield "clips longer than the encoder's window: training split them, this class cuts them off"


def budget_differences(config: DataConfig) -> Iterator[str]:
    """Yield the budgets of pixels that no processor of transformers has."""
    for key, of in (("record_max_pixels", "all pictures of a conversation"), ("video_max_pixels", "all frames of a video")):
        if value := getattr(config, key):
            yield f"{of}: training gave them data.{key} = {value} together, this class's processor sizes each by itself"
    if config.frame_times and config.min_frames > 1:
        yield f"videos: training took data.min_frames = {config.min_frames} frames of the shortest, this class's processor one"


def facts_of(processor: Processor) -> MediaFacts:
    """Return how the run showed its media, as its processor has it."""
    config, template = processor.config, processor.template
    anyres = config.image_fit == "anyres" and "image" in processor.specs
    found = MediaFacts(
        fit=config.image_fit,
        grids=grids(config.image_grid, image_spec(processor.specs).size) if anyres else (),
        anyres_max=config.anyres_max,
        min_tiles=config.min_tiles,
        max_tiles=config.max_tiles,
        thumbnail=config.thumbnail,
        wrap=template.media_wrap,
        wrap_is_tokens=all(text in processor.tokenizer.get_vocab() for text in template.media_wrap),
        around_clips=CLIP_ENDS if all(text in template.source for text in CLIP_ENDS) else ("", ""),
        around_pictures=next((pair for pair in PAIRS if all(text in template.source for text in pair)), template.media_wrap),
        **_placeholders(processor),
    )
    return _limited(found, processor)


def _limited(facts: MediaFacts, processor: Processor) -> MediaFacts:
    """Return the facts with the least and the most of pictures and videos, where these are cut or read at their own size."""
    spec = processor.specs.get("image")
    if facts.fit == "idefics":
        config = processor.config
        facts = replace(facts, cut=config.cut_tiles, sampling=(config.fps, config.max_frames))
        return replace(facts, longest=config.side_tiles * image_spec(processor.specs).size)
    if not isinstance(spec, NativeSpec):
        return facts
    rule, clips = rule_of(spec, processor.config), clip_budget(spec, processor.config)
    pixels, of_clips = (rule.min_pixels, rule.max_pixels), (clips.min_pixels, clips.max_pixels)
    return replace(facts, pixels=pixels, clip_pixels=of_clips, longest=rule.longest)


def _placeholders(processor: Processor) -> dict[str, Any]:
    """Return the placeholder of each kind of medium, and its id; the first free id stands for what the tokenizer lacks."""
    ids, spec, known = processor.template.placeholder_ids, processor.specs.get("image"), processor.tokenizer.get_vocab()
    video = (spec.video_placeholder or "<|video_pad|>") if isinstance(spec, NativeSpec) else PLACEHOLDERS["video"]
    named = {"video": video, "vision_start": AROUND[0], "vision_end": AROUND[1]}
    if isinstance(spec, NativeSpec) and spec.reader:
        named = {kind: text for kind, text in GLM_TOKENS.items() if kind not in ids}
        video = named["video"]
    tokens = {kind: str(processor.tokenizer.convert_ids_to_tokens(id_)) for kind, id_ in ids.items()}
    others = {kind: known.get(text, len(processor.tokenizer)) for kind, text in named.items()}
    others |= {sign: known[sign] for text in processor.template.media_wrap if (sign := text.strip()) in known}
    return {"tokens": {**tokens, "video": video}, "ids": {**ids, **others}}


def write_folder(folder: Path, target: HfClass, card: ModelCard, model: MultimodalLM, processor: Processor) -> None:
    """Write config.json, weights, processor and tokenizer files. The adapters of `model` are left out."""
    facts = facts_of(processor)
    files = {
        "config.json": class_config(target, card, model, facts),
        "generation_config.json": {"eos_token_id": list(processor.stop_ids), "pad_token_id": pad_id(processor.tokenizer)},
        **processor_files(target, processor.specs[target.modality], facts),
    }
    for name, value in files.items():
        (folder / name).write_text(dump_json(value))
    source = for_parts(processor, target)
    named = named_tokens(target, facts)
    save_tokenizer(grown_tokenizer(processor.tokenizer, named.values()), folder, chat_template=source)
    (folder / "chat_template.json").write_text(dump_json({"chat_template": source}))  # where processors of 4.x look
    config = folder / "tokenizer_config.json"
    extra: Json = {"additional_special_tokens": [facts.tokens[target.modality]]}
    if named:
        extra["extra_special_tokens"] = named
    config.write_text(json.dumps({**json.loads(config.read_text()), **extra}, indent=2, ensure_ascii=False) + "\n")
    write_weights(folder, weights(target, card, model))


def grown_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer with each text as a token: vLLM shows a processor a video before it serves, and none may be missing."""
    if missing := [text for text in texts if text and text not in tokenizer.get_vocab()]:
        tokenizer = deepcopy(tokenizer)
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in missing], special_tokens=True)
    return tokenizer


def for_parts(processor: Processor, target: HfClass) -> str:
    """Return the run's chat template for contents as transformers users write them: lists of parts, or strings with `<image>`.

    Both become the string that training rendered: parts on lines of their own, media first or as written, wrapped.
    """
    template = processor.template
    token = facts_of(processor).tokens[target.modality]
    if target is GEMMA3:
        return with_signs_alone(template.source, token, template.media_wrap)
    if takes_parts(template.source):
        return template.source
    before, after = template.media_wrap if template.media_wrap and not wraps(target) and target.modality == "image" else ("", "")
    placeholder = PLACEHOLDERS[target.modality]
    medium, wrapped = json.dumps(placeholder), json.dumps(before + token + after)
    first = f"(({medium} + '\\n') * (text.split({medium}) | length - 1) + text.replace({medium}, '') | trim) | trim"
    arranged = first if template.placeholders == "first" else "text"
    prelude = "".join(jinja_file(__package__, "strings_of_parts.jinja").splitlines())
    return Template(prelude).substitute(medium=medium, wrapped=wrapped, arranged=arranged) + template.source


def prove_folder(folder: Path, target: HfClass, model: MultimodalLM, processor: Processor) -> float:
    """Open `folder` with transformers and compare ids, media and logits on a sample.

    Both models run in float32 on the weights that were written. Returns the largest relative difference of the logits. Raises
    ProofError where ids, pixels, sound features or logits differ.
    """
    with sample(processor) as record:
        batch = batch_of(processor, record)
        inputs = their_inputs(folder, target, record, batch, processor)
    expected = logits(in_float32(model), batch)
    theirs = reopened(getattr(transformers, target.name), folder)
    with torch.no_grad():
        found = theirs(**inputs).logits[0]
    return check_close(found, expected, f"{target.name} and this model")
