"""The input that transformers' processor makes of a record, compared with what training saw of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers 5.17 exports it with torchvision only
from transformers.utils import is_torchvision_available

from data.media.blob import Blob
from data.media.resample import resample
from data.media.sound import read_audio
from data.processor import Processor
from model.batch import Batch
from model.exports.hf_classes import HfClass
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
    values = batch.media["image"].values
    expected = seen_pixels(values, image_spec(processor.specs))
    found: Tensor = inputs["pixel_values"].reshape(-1, *expected.shape[1:])
    atol = 1e-6 if values.dtype == torch.uint8 else 0
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=atol):
        raise ProofError("AutoProcessor gives other pixels than training saw")
    return dict(inputs)


def seen_pixels(values: Tensor, spec: ImageSpec) -> Tensor:
    """Return pictures (N, 3, H, W), or packed patches as transformers has them: (P, 3 * F * p * p), every frame of a still one."""
    found = normalised(values, spec, torch.float32)
    return found.expand(-1, -1, spec.frames, -1, -1).flatten(1) if isinstance(spec, NativeSpec) else found


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
