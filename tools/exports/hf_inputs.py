"""The input that transformers' processor makes of a record, compared with what training saw of it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers 5.17 exports it with torchvision only
from transformers.utils import is_num2words_available, is_torchvision_available

from data.media.blob import Blob
from data.media.resample import resample
from data.media.sound import read_audio
from data.processor import Processor
from model.batch import Batch, Media
from model.exports.hf_classes import IDEFICS3, SMOLVLM, HfClass
from model.exports.hf_pixtral import PROCESSOR
from model.exports.hf_processors import NESTED, VIDEO, processor_class
from model.files.untrusted import Json, load_json
from model.media_spec import AudioSpec, ImageSpec, NativeSpec, image_spec
from model.vision.normalise import normalised
from trainer.errors import ProofError

PARTS = ("image_processor", "video_processor", "feature_extractor", "processor_class")


def open_processor(folder: Path, target: HfClass) -> Any:
    """Open the processor of an exported folder, with Pillow's resizing where pictures are resized.

    A class that also reads videos cannot be opened without torchvision: it is then made of its other parts.
    """
    if target.modality == "audio":
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if target.processor == PROCESSOR and not is_torchvision_available():
        return _pixtral_reader(folder)
    if target is IDEFICS3 and not is_torchvision_available():
        return _idefics_reader(folder, target)
    if target is SMOLVLM and not (is_torchvision_available() and is_num2words_available()):
        return _smolvlm_reader(folder)
    if not (folder / VIDEO).is_file():
        return AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    image, tokenizer = (
        AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    if is_torchvision_available():
        reader = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        reader.image_processor = image
        return reader
    settings = {key: value for key, value in load_json(folder / NESTED).items() if key not in PARTS}
    kind = _without_videos(getattr(transformers, processor_class(target)))
    return kind(image_processor=image, tokenizer=tokenizer, chat_template=tokenizer.chat_template, **settings)


def _pixtral_reader(folder: Path) -> ProcessorMixin:
    """Open Pixtral's processor without torchvision, which its module imports for one function that Pillow's has too."""
    package, name = "transformers.models.pixtral", "transformers.models.pixtral.image_processing_pixtral"
    pillow = import_module(f"{package}.image_processing_pil_pixtral")
    sys.modules[name] = pillow
    try:
        kind = import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[name]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    settings = {key: value for key, value in load_json(folder / NESTED).items() if key not in PARTS}
    pixels = pillow.PixtralImageProcessorPil.from_pretrained(folder, trust_remote_code=False)
    found: ProcessorMixin = kind(pixels, tokenizer, chat_template=tokenizer.chat_template, **settings)
    return found


def _idefics_reader(folder: Path, target: HfClass, **parts: None) -> ProcessorMixin:
    """Open the processor of Idefics3 or SmolVLM with its image processor of Pillow, which 5.17 finds with torchvision alone."""
    package, name = f"transformers.models.{target.model_type}", target.name.removesuffix("ForConditionalGeneration")
    pillow = import_module(f"{package}.image_processing_pil_{target.model_type}")
    kind = _without_videos(getattr(import_module(f"{package}.processing_{target.model_type}"), f"{name}Processor"))
    image = getattr(pillow, f"{name}ImageProcessorPil").from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    settings = {key: value for key, value in load_json(folder / NESTED).items() if key not in PARTS}
    found: ProcessorMixin = kind(image, tokenizer, chat_template=tokenizer.chat_template, **parts, **settings)
    return found


def _smolvlm_reader(folder: Path) -> ProcessorMixin:
    """Open SmolVLM's processor for pictures, without the packages that it asks for to read videos and to count their frames."""
    names = vars(import_module("transformers.models.smolvlm.processing_smolvlm"))
    installed = names["num2words"]
    names["num2words"] = installed or str
    try:
        found = _idefics_reader(folder, SMOLVLM, video_processor=None)
    finally:
        names["num2words"] = installed
    found.video_processor = SimpleNamespace(num_frames=1, fps=1)  # asked for of conversations without videos too
    return found


def _without_videos(kind: Any) -> Any:
    """Return the class of a processor that also takes None for its reader of videos."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def their_inputs(folder: Path, target: HfClass, record: Json, batch: Batch, processor: Processor) -> Json:
    """Return what the folder's processor makes of the record. Raises ProofError where it is not what training saw."""
    reader = open_processor(folder, target)
    if target.modality == "audio":
        return _heard(reader, record, batch, processor)
    inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
    _check_ids(inputs, batch)
    media = batch.media["image"]
    expected = seen_pixels(media, image_spec(processor.specs))
    found: Tensor = inputs["pixel_values"].reshape(-1, *expected.shape[1:])
    atol = 1e-6 if media.values.dtype == torch.uint8 else 0
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=atol):
        raise ProofError("AutoProcessor gives other pixels than training saw")
    return dict(inputs)


def seen_pixels(media: Media, spec: ImageSpec) -> Tensor:
    """Return what transformers' class reads of the pictures of a batch: pictures (N, 3, H, W), or packed patches.

    These are (P, 3 * F * p * p), every frame of a still picture. Pixtral reads its one picture whole, (1, 3, H, W).
    """
    found = normalised(media.values, spec, torch.float32)
    if media.patches is None or not isinstance(spec, NativeSpec):
        return found
    if spec.resize == "pixtral":
        return _whole(found, media.patches.positions)
    return found.expand(-1, -1, spec.frames, -1, -1).flatten(1)


def _whole(patches: Tensor, positions: Tensor) -> Tensor:
    """Return the picture (1, 3, H, W) whose patches (P, 3, 1, p, p) stand at rows and columns (P, 2)."""
    high, wide = (positions.amax(0) + 1).tolist()
    grid = patches.new_empty(high, wide, *patches[0, :, 0].shape)
    grid[positions[:, 0], positions[:, 1]] = patches[:, :, 0]
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]


def _heard(reader: Any, record: Json, batch: Batch, processor: Processor) -> Json:
    spec = processor.specs["audio"]
    assert isinstance(spec, AudioSpec)
    (path,) = [part["path"] for part in record["messages"][0]["content"] if part["type"] == "audio"]
    rate, samples = read_audio(Blob(path, path), processor.config.max_seconds)
    clip = resample(samples, rate, spec.sampling_rate).numpy()
    text = reader.apply_chat_template(record["messages"], tokenize=False)
    options = {"sampling_rate": spec.sampling_rate, "add_special_tokens": False, "return_tensors": "pt"}
    inputs = reader(text=text, audio=[clip], **options)
    _check_ids(inputs, batch)
    values = batch.media["audio"].values
    if inputs["input_features"].shape != values.shape or not torch.allclose(inputs["input_features"], values, rtol=0, atol=1e-5):
        raise ProofError("AutoProcessor gives other sound features than training heard")
    return dict(inputs)


def _check_ids(inputs: Any, batch: Batch) -> None:
    if inputs["input_ids"].tolist() != batch.input_ids.tolist():
        raise ProofError(f"AutoProcessor gives other ids: {inputs['input_ids'].tolist()} and not {batch.input_ids.tolist()}")
