"""Weights of the Hugging Face folders that parts start from: read, checked for unknown tensors, and fitted to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from model.audio import encoder as audio
from model.card import ModelCard
from model.errors import ConfigError
from model.files.hub import hugging_face_config, read_json
from model.files.quantised_base import check_dequantizable, check_plain, dequantised_fp8, quantisation
from model.files.tensor_files import Tensors, sampled_digest
from model.llm.causal_lm import blocks
from model.llm.experts import fuse_experts
from model.llm.new_tokens import is_new_rows
from model.lora import is_adapter
from model.multimodal import MultimodalLM
from model.published.table import find_layout, part_config, part_files, part_tensors
from model.vision import tower as vision
from model.vision.position_embeddings import resize_positions
from model.vision.tower import VisionTower
from model.vision.tower_kinds import tower_tensors_in_files
from model.weights.accounting import EncoderFiles, EncoderNames, check_encoder, check_llm, prefixed
from model.weights.initial_values import grow_embedding
from model.weights.materialise import Layer, kept_buffers, owners
from model.weights.merged_adapter import adapter_files, with_adapter
from model.weights.peft_adapter import CONFIG, PICKLED, WEIGHTS
from model.weights.renamed import renamed

LLM = "model.llm.path"


def base_layers(card: ModelCard, model: MultimodalLM) -> list[Layer]:
    """Return the Hugging Face folders as layers. Each is opened only when a tensor of it is needed.

    Opening one raises `ConfigError` when its digest is not that in the card, or when it holds a tensor the model has no place for.
    """
    config = card.model
    layers = [Layer(config.llm.path, lambda: llm_tensors(card, model), prefix="llm.")]

    readers: dict[str, Callable[..., Tensors]] = {"vision": tower_tensors, "audio": audio_tensors}
    for part, read in readers.items():
        if (settings := getattr(config, part)) is not None:
            opened = partial(read, settings.path, model.get_submodule(part), config.cache_dir, digest=card.bases.get(part, ""))
            layers.append(Layer(settings.path, opened, prefix=f"{part}."))
    return layers


def base_tensors(part: str, path: str, cache_dir: str, digest: str, beside: Sequence[Path] = ()) -> Tensors:
    """Return every tensor of a base, or those of its part in a published model.

    `beside`: further files of its fingerprint. Raises `ConfigError` when that is not `digest` ("" = unknown).
    """
    files = [*part_files(f"model.{part}.path", path, cache_dir), *beside]
    if digest and sampled_digest(files) != digest:
        raise ConfigError(
            f"model.{part}.path = {path!r} holds other weights than the ones this run was trained on: restore them, or name "
            f"the folder where they are, as load_model(..., base={{{part!r}: path}})"
        )
    return part_tensors(f"model.{part}.path", part, path, cache_dir)


def llm_tensors(card: ModelCard, model: MultimodalLM) -> Tensors:
    """Return the language model's tensors by full name, with vocabulary matrices grown to the model's size."""
    config = card.model
    beside = adapter_files(config.llm, config.cache_dir)
    found = base_tensors("llm", config.llm.path, config.cache_dir, card.bases.get("llm", ""), beside)
    settings = quantisation(part_config(LLM, "llm", config.llm.path, config.cache_dir))
    own = file_names(model.llm)
    check_adapter_beside(config.llm.path, card.lora.path or config.llm.adapter)
    if config.llm.dequantize:
        check_dequantizable(config.llm.path, settings)
        found = dequantised_fp8(f"{LLM} = {config.llm.path!r}", found, settings or {})
    else:
        check_plain(LLM, config.llm.path, settings, found, own.keys() - integers(model.llm))
    found = renamed(prefixed(found, own, model.llm.base_model_prefix), own, model.llm)
    found = fuse_experts(found, own)
    check_llm(LLM, config.llm.path, found, model.llm, own)
    found = {f"llm.{name}": rows for name, rows in found.items()}
    check_vocabulary(card, found, model)
    if config.llm.adapter:
        inside = find_layout(LLM, config.llm.path, config.cache_dir) is not None
        found = with_adapter(found, beside[0].parent, model.llm, inside)
    return resize_vocabulary(found, card, None, model)


def check_adapter_beside(path: str, adapter: str) -> None:
    """Refuse a base with an adapter in its folder that `adapter`, lora.path, does not name: transformers would load it on top."""
    folder = Path(path)
    own = [place.resolve() for place in (folder, folder / WEIGHTS, folder / PICKLED)]
    if (folder / CONFIG).is_file() and not (adapter and Path(adapter).resolve() in own):
        raise ConfigError(
            f"{LLM} = {path!r} holds an adapter beside the weights ({CONFIG}), which transformers would load on top of them: name "
            f"it as lora.path = {path!r} to go on with it, or move {CONFIG} and adapter_model.* away to start from the base alone"
        )


def integers(module: nn.Module) -> set[str]:
    """Return kept buffers that hold integers by their nature, as a router's table of experts by token."""
    return {name for name, owner, key in kept_buffers(module) if not owner.get_buffer(key).is_floating_point()}


def file_names(module: nn.Module) -> dict[str, int]:
    """Return the names that files have for the parameters and kept buffers of `module`. Names of one parameter share a number."""
    found = {
        name: number
        for number, names in enumerate(owners(module).values())
        for name in names
        if not is_adapter(name) and not is_new_rows(name)
    }
    return found | {name: -1 - n for n, (name, _, _) in enumerate(kept_buffers(module))}


def check_vocabulary(card: ModelCard, tensors: Tensors, model: MultimodalLM) -> None:
    """Refuse vocabulary matrices whose rows differ from config.json, as transformers does: either number could be wrong."""
    declared = hugging_face_config(LLM, card.hugging_face["llm"]).vocab_size
    for name in vocabulary_matrices(model):
        if name in tensors and tensors[name].shape[0] != declared:
            raise ConfigError(
                f"{LLM} = {card.model.llm.path!r}: vocab_size = {declared} in config.json, but {name.removeprefix('llm.')} has "
                f"{tensors[name].shape[0]} rows in the files: restore the config.json that belongs to them"
            )


def resize_vocabulary(tensors: Tensors, card: ModelCard, saved: ModelCard | None, model: MultimodalLM) -> Tensors:
    """Return the tensors with vocabulary matrices grown to the model's size. Rows of tokens known to their origin are kept."""
    known = set(saved.vocabulary.new_ids) if saved else set()
    new_ids = tuple(token for token in card.vocabulary.new_ids if token not in known)
    for name, num_rows in vocabulary_matrices(model).items():
        if name in tensors and (new_ids or tensors[name].shape[0] != num_rows):
            tensors = {**tensors, name: grow_embedding(tensors[name], num_rows, card.vocabulary, new_ids)}
    return tensors


def vocabulary_matrices(model: MultimodalLM) -> dict[str, int]:
    """Return the full names of the embedding and the head, with their numbers of rows."""
    matrices = [model.llm.get_input_embeddings().weight, model.llm.get_output_embeddings().weight]
    return {
        name: parameter.shape[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(parameter is matrix for matrix in matrices)
    }


def tower_tensors(path: str, tower: VisionTower, cache_dir: str, others: tuple[str, ...] = (), digest: str = "") -> Tensors:
    """Return the tower's own tensors, and `others` that it does not build, from a folder that may hold more, under any prefix.

    Position embeddings are resized to the image size that the tower was built for.
    """
    files = base_tensors("vision", path, cache_dir, digest)
    shapes = {name: tuple(p.shape) for name, p in tower.tower.named_parameters() if not is_adapter(name)}
    wanted = [*shapes, *others]
    prefix, here = tower_tensors_in_files(f"{vision.SETTING} = {path!r}", files, wanted, tower.kind)
    check_plain(vision.SETTING, path, None, here, wanted)
    nested = "vision_config" in read_json(vision.SETTING, path, "config.json", cache_dir)
    outside = [name for name in files if not name.startswith(prefix)]
    names = EncoderNames(wanted, tower.num_blocks, type(tower.tower).__name__, tower.is_unused)
    check_encoder(vision.SETTING, path, EncoderFiles(here, outside, nested), names)
    found = {name: here[name] for name in wanted if name in here}
    name = tower.kind.positions
    if tower.resizes and name in found:
        found[name] = resize_positions(found[name], shapes[name], tower.kind)
    return {f"vision.tower.{name}": rows for name, rows in found.items()}


def audio_tensors(path: str, encoder: audio.AudioEncoder, cache_dir: str = "", digest: str = "") -> Tensors:
    """Return the encoder's own tensors from a folder that may hold more, under any prefix."""
    files = base_tensors("audio", path, cache_dir, digest)
    wanted = [name.removeprefix("tower.") for name, _ in encoder.named_parameters() if not is_adapter(name)]
    prefixes = [p for p in audio.PREFIXES if p + wanted[0] in files]
    if len(prefixes) > 1:
        raise ConfigError(
            f"{audio.SETTING} = {path!r}: the files hold two encoders, under {' and '.join(f'{p}...' for p in prefixes)}: save the "
            "one that is meant into a folder of its own"
        )
    prefix = prefixes[0] if prefixes else ""
    here = {name.removeprefix(prefix): rows for name, rows in files.items() if name.startswith(prefix)}
    check_plain(audio.SETTING, path, None, here, wanted)
    nested = bool(part_config(audio.SETTING, "audio", path, cache_dir).get("audio_config"))
    outside = [name for name in files if not name.startswith(prefix)]
    total = len(blocks(encoder.tower))
    names = EncoderNames(wanted, (total, total), "the audio encoder")
    check_encoder(audio.SETTING, path, EncoderFiles(here, outside, nested), names)
    return {f"audio.tower.{name}": here[name] for name in wanted if name in here}
