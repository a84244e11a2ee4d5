"""model.json: everything that determines a model's structure, and the origins of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import transformers

from model.audio.encoder import audio_config, audio_spec
from model.config import (
    AudioConfig,
    AudioProjectorConfig,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    PartConfig,
    QuantizeConfig,
    StateHeadConfig,
    VisionConfig,
    VisionProjectorConfig,
)
from model.errors import ConfigError
from model.files.quantised_base import check_dequantizable, check_settings, quantisation, without_quantisation
from model.files.tensor_files import dump_json, sampled_digest
from model.files.untrusted import Json, load_json
from model.llm.causal_lm import VocabularyLayout, llm_config
from model.llm.multi_axis_rope import SECTIONS
from model.media_spec import MediaSpec, NativeSpec, spec_from_json, spec_to_json
from model.published.table import part_files
from model.vision.projector import projected_spec
from model.vision.tower import vision_config, vision_spec
from model.weights.merged_adapter import adapter_files

NAME = "model.json"
MOVED = (
    "relative paths start where the run was started; name what has moved as model.init_from of a run file, with "
    "base={'init_from': PATH} of load_model, or as --base init_from=PATH of the tools"
)
PART_CONFIGS: dict[str, Callable[..., PartConfig]] = {
    "llm": LlmConfig,
    "vision": VisionConfig,
    "vision_projector": VisionProjectorConfig,
    "audio": AudioConfig,
    "audio_projector": AudioProjectorConfig,
    "state_head": StateHeadConfig,
}


@dataclass(frozen=True)
class ModelCard:
    """A description of a model without its weights."""

    model: ModelConfig
    lora: LoraConfig
    hugging_face: dict[str, Json]  # config.json of each part that has one
    specs: dict[str, MediaSpec]
    vocabulary: VocabularyLayout
    tokens: tuple[str, ...] = ()  # tokens added to the base tokenizer, in order
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    bases: dict[str, str] = field(default_factory=dict)  # digest of the base weights of each part
    transformers: str = transformers.__version__
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)  # storage of the llm's matrices

    def to_json(self) -> Json:
        value = dataclasses.asdict(self)
        value["specs"] = {name: spec_to_json(spec) for name, spec in self.specs.items()}
        return value

    @property
    def lora_parts(self) -> frozenset[str]:
        """Return the parts that have adapters."""
        return frozenset(name for name, part in self.model.parts().items() if part.tune == "lora")


def make_card(
    config: ModelConfig,
    lora: LoraConfig,
    vocabulary: VocabularyLayout,
    *,
    quantize: QuantizeConfig = QuantizeConfig(),  # noqa: B008  frozen
) -> ModelCard:
    """Make the card of a new model from the JSON files of its parts, without the fields that the tokenizer decides."""
    hugging_face = {"llm": language_model_config(config)}
    if config.vision is not None:
        hugging_face["vision"] = vision_config(config.vision, config.cache_dir)
    if config.audio is not None:
        hugging_face["audio"] = audio_config(config.audio, config.cache_dir)
    return ModelCard(config, lora, hugging_face, media_specs(config), vocabulary, quantize=quantize)


def language_model_config(config: ModelConfig) -> Json:
    """Read config.json of the language model, without the quantisation when `dequantize` removes it from the weights.

    Raises `ConfigError` for a quantised folder without `dequantize`, and for `dequantize` where it is not possible.
    """
    value = llm_config(config.llm, config.cache_dir)
    if not config.llm.dequantize:
        check_settings("model.llm.path", config.llm.path, value)
        return value
    check_dequantizable(config.llm.path, quantisation(value))
    return without_quantisation(value)


def media_specs(config: ModelConfig) -> dict[str, MediaSpec]:
    """Return the facts that `data` needs, by modality, from JSON files alone; no weight is read."""
    specs: dict[str, MediaSpec] = {}
    if config.vision is not None and config.vision_projector is not None:
        seen = projected_spec(vision_spec(config.vision, config.cache_dir), config.vision_projector)
        if isinstance(seen, NativeSpec):
            text = llm_config(config.llm, config.cache_dir)
            seen = replace(seen, axes=3 if text.get(SECTIONS) else 1)
            if seen.axes == 3 and seen.line_ends:
                raise ConfigError(
                    f"model.vision.line_ends = {list(seen.line_ends)} with a language model whose positions have three axes: they "
                    "stand for lines, and tokens between them have no place; remove it"
                )
        specs["image"] = seen
    if config.audio is not None and config.audio_projector is not None:
        spec = audio_spec(config.audio, config.audio_projector, config.cache_dir)
        specs["audio"] = replace(spec, num_states=config.state_head.classes if config.state_head is not None else 0)
    return specs


def base_digests(config: ModelConfig) -> dict[str, str]:
    """Compute a fingerprint of the base weights of each part."""
    paths = {name: getattr(config, name).path for name in ("llm", "vision", "audio") if getattr(config, name) is not None}
    beside = {"llm": adapter_files(config.llm, config.cache_dir)}
    files = {n: [*part_files(f"model.{n}.path", path, config.cache_dir), *beside.get(n, [])] for n, path in paths.items()}
    return {name: sampled_digest(found) for name, found in files.items()}


def write_card(card: ModelCard, folder: Path) -> None:
    (folder / NAME).write_text(dump_json(card.to_json()))


def read_card(folder: Path) -> ModelCard:
    """Read the card in a final/ folder or a checkpoint. Raises `ConfigError` when it is missing or cannot be read."""
    try:
        value = load_json(folder / NAME)
    except (OSError, ValueError) as error:
        hint = f"did you mean {folder / 'final'}?" if (folder / "final" / NAME).is_file() else MOVED
        raise ConfigError(f"{folder} is no final/ or checkpoint folder of ours: {NAME} cannot be read ({error}); {hint}") from error
    try:
        return _card(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{folder / NAME} does not describe a model this version can build: {error}") from error


def _card(value: Json) -> ModelCard:
    model = dict(value["model"])
    for name, config in PART_CONFIGS.items():
        model[name] = None if model[name] is None else config(**_tuples(model[name]))
    return ModelCard(
        **{
            **_tuples(value),
            "model": ModelConfig(**model),
            "lora": LoraConfig(**_tuples(value["lora"])),
            "quantize": QuantizeConfig(**value.get("quantize", {})),
            "vocabulary": VocabularyLayout(**_tuples(value["vocabulary"])),
            "specs": {name: spec_from_json(spec) for name, spec in value["specs"].items()},
        }
    )


def _tuples(value: Json) -> Json:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
