"""The JSON files that AutoProcessor reads: the nested one of current versions, and the flat one of older versions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from model.exports.hf_classes import GEMMA3, IDEFICS3, INTERN_VL, LLAVA, NATIVE, NEXT, ONEVISION, SMOLVLM, HfClass
from model.exports.hf_configs import strategy
from model.exports.hf_gemma import gemma_reader, gemma_tokens
from model.exports.hf_idefics import frame_reader, idefics_reader
from model.exports.hf_native import native_clips, native_pixels
from model.exports.hf_pixtral import PROCESSOR, pixtral_reader
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS, AudioSpec, ImageSpec, MediaMeta, MediaSpec, NativeSpec, num_tokens, view_tokens

NESTED, FLAT, VIDEO = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
ONE_VIEW = {"shortest_edge": "CLIPImageProcessor", "exact": "SiglipImageProcessor"}


def processor_files(target: HfClass, spec: MediaSpec, facts: MediaFacts) -> dict[str, Json]:
    """Return the processor's JSON files by name; it gives the same input as ours."""
    if isinstance(spec, AudioSpec):
        return _hearing_files(spec, facts)
    own, image = _READERS[target.processor or target.name](spec, facts)
    whole = {"processor_class": processor_class(target), **own}
    files = {NESTED: {**whole, "image_processor": image}, FLAT: {**image, "processor_class": whole["processor_class"]}}
    if target in SEES_VIDEOS:
        files[VIDEO] = _frames(spec, facts, target)
        files[NESTED]["video_processor"] = files[VIDEO]
    return files


def processor_class(target: HfClass) -> str:
    """Return the name of the processor's class."""
    return target.processor or target.name.replace("MoeFor", "For").replace("ForConditionalGeneration", "Processor")


def named_tokens(target: HfClass, facts: MediaFacts) -> dict[str, str]:
    """Return the tokens that a processor looks up by name in its tokenizer."""
    video = {"video_token": PLACEHOLDERS["video"]}
    if target is ONEVISION:
        return {"image_token": facts.tokens["image"], **video}
    if target in (IDEFICS3, SMOLVLM):
        return {"image_token": facts.tokens["image"]}
    if target is GEMMA3:
        return gemma_tokens(facts)
    if target.native:
        return {"image_token": facts.tokens["image"], "video_token": facts.tokens["video"]}
    before, after = facts.around
    around = {"start_image_token": before, "end_image_token": after}
    return {**around, "context_image_token": facts.tokens["image"], **video} if target is INTERN_VL else {}


def wraps(target: HfClass) -> bool:
    """Tell whether the processor itself writes the texts around every medium, so that the chat template must not."""
    return target in (INTERN_VL, GEMMA3)


def _normalising(spec: ImageSpec) -> Json:
    return {
        "do_resize": True,
        "resample": spec.resample,
        "do_rescale": True,
        "rescale_factor": spec.rescale,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "do_convert_rgb": True,
    }


def _square(spec: ImageSpec) -> dict[str, int]:
    return {"height": spec.size, "width": spec.size}


def _llava(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    pads = facts.fit == "pad"
    crops = spec.resize == "shortest_edge" or pads
    image = {
        "image_processor_type": "LlavaImageProcessor" if pads else ONE_VIEW[spec.resize],
        **({"do_pad": True} if pads else {}),
        "size": {"shortest_edge": spec.size} if crops else _square(spec),
        **({"do_center_crop": True, "crop_size": _square(spec)} if crops else {}),
        **_normalising(spec),
    }
    return _counting(spec, facts), image


def _counting(spec: ImageSpec, facts: MediaFacts) -> Json:
    return {
        "patch_size": spec.patch,
        "image_token": facts.tokens["image"],
        "vision_feature_select_strategy": strategy(spec),
        "num_additional_image_tokens": spec.num_prefix,
    }


def _next(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    image = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": spec.size},
        "do_center_crop": True,
        "crop_size": _square(spec),
        "image_grid_pinpoints": facts.pinpoints(spec.size),
        "do_pad": True,
        **_normalising(spec),
    }
    return _counting(spec, facts), image


def _onevision(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    own = {
        "num_image_tokens": view_tokens(spec) + (strategy(spec) == "default"),
        "image_token": facts.tokens["image"],
        "video_token": PLACEHOLDERS["video"],
        "vision_feature_select_strategy": strategy(spec),
        "vision_aspect_ratio": f"anyres_max_{facts.anyres_max}",
    }
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": _square(spec),
        "image_grid_pinpoints": facts.pinpoints(spec.size),
        "do_pad": True,
        **_normalising(spec),
    }
    return own, image


def _intern(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    # Its processor cuts whatever its image processor says; one tile at most is one view.
    tiles = facts.fit == "tiles"
    image = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": _square(spec),
        "crop_to_patches": tiles,
        "min_patches": facts.min_tiles if tiles else 1,
        "max_patches": facts.max_tiles if tiles else 1,
        **_normalising(spec),
    }
    return {"image_seq_length": num_tokens(spec, MediaMeta())}, image


def _native(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    assert isinstance(spec, NativeSpec)
    own = {"processor_class": f"{spec.reader}Processor"} if spec.reader else {}
    return own, {**native_pixels(spec, facts), **_normalising(spec)}


def _pixtral(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    own, image = pixtral_reader(spec, facts)
    return own, {**image, **_normalising(spec)}


def _idefics(spec: ImageSpec, facts: MediaFacts, kind: str) -> tuple[Json, Json]:
    own, image = idefics_reader(spec, facts, kind)
    return own, {**image, **_normalising(spec)}


def _gemma(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    own, image = gemma_reader(spec)
    return own, {**image, **_normalising(spec)}


def _frames(spec: ImageSpec, facts: MediaFacts, target: HfClass) -> Json:
    if isinstance(spec, NativeSpec) and target.native:
        return {**native_clips(spec, facts, target.native), **_normalising(spec)}
    if target is SMOLVLM:
        return {**frame_reader(spec, facts), **_normalising(spec)}
    kind = target.name.removesuffix("ForConditionalGeneration") + "VideoProcessor"
    return {"video_processor_type": kind, "size": _square(spec), **_normalising(spec)}


def _hearing_files(spec: AudioSpec, facts: MediaFacts) -> dict[str, Json]:
    before, after = facts.around_clips
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": spec.num_mels,
        "sampling_rate": spec.sampling_rate,
        "hop_length": spec.hop,
        "n_fft": spec.n_fft,
        "chunk_length": spec.window_frames * spec.hop // spec.sampling_rate,
        "n_samples": spec.window_frames * spec.hop,
        "nb_max_frames": spec.window_frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }
    whole = {
        "processor_class": "Qwen2AudioProcessor",
        "audio_token": facts.tokens["audio"],
        "audio_bos_token": before,
        "audio_eos_token": after,
    }
    return {NESTED: {**whole, "feature_extractor": extractor}, FLAT: {**extractor, "processor_class": whole["processor_class"]}}


_READERS: dict[str, Callable[[ImageSpec, MediaFacts], tuple[Json, Json]]] = {
    LLAVA.name: _llava,
    NEXT.name: _next,
    ONEVISION.name: _onevision,
    INTERN_VL.name: _intern,
    **{target.name: _native for target in NATIVE},
    PROCESSOR: _pixtral,
    GEMMA3.name: _gemma,
    IDEFICS3.name: partial(_idefics, kind="Idefics3ImageProcessor"),
    SMOLVLM.name: partial(_idefics, kind="SmolVLMImageProcessor"),
}
SEES_VIDEOS = (ONEVISION, INTERN_VL, *NATIVE, SMOLVLM)
"""Classes whose processors have a reader of videos."""
