"""Layers of the parts that have a `path` and no base, and of the rows of the vocabulary that LLaVA trained beside a projector."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from model.card import ModelCard
from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, Tensors, read_weights
from model.files.untrusted import listed, shown
from model.media_spec import PLACEHOLDERS
from model.multimodal import MultimodalLM
from model.projector import LLAVA_TRAINED
from model.weights.materialise import Layer
from model.weights.new_token_rows import RowPatch
from model.weights.projector_files import read_saved_projector, stored_file, whole_projector

OWN_PATHS = ("vision_projector", "audio_projector", "state_head")
"""Parts that have a `path` and no base."""
WRAP = ("<im_start>", "<im_end>")
"""Tokens around a picture whose rows LLaVA trains with mm_use_im_start_end."""
ROWS = ("embed_tokens.weight", "embed_in.weight")


def part_layers(card: ModelCard, model: MultimodalLM, held: Collection[str], claimed: Collection[str]) -> list[Layer]:
    """Return layers for parts that have a `path`, except those in `held`. Raises `ConfigError` for one in `claimed`."""
    layers = []
    for part in OWN_PATHS:
        config = card.model.parts().get(part)
        path: str = getattr(config, "path", "")
        if not path or _holds(held, part):
            continue
        if _holds(claimed, part):
            what = "projector" if part.endswith("projector") else "state head"
            raise ConfigError(f"model.{part}.path and model.init_from both hold the {what}: name one of them")
        beside = _read_elsewhere(card, path, part)
        opened = partial(whole_projector, Path(path), part, model.get_submodule(part), card.model.cache_dir, beside)
        layers += [*_row_layers(card, model, path, part), Layer(path, opened, prefix=f"{part}.")]
    return layers


def trained_layers(card: ModelCard, model: MultimodalLM, claimed: Collection[str]) -> list[Layer]:
    """Return layers for `weights` of the tower and the encoder: tensors that were trained on top of their bases.

    Raises `ConfigError` for a part in `claimed`.
    """
    layers = []
    for part in ("vision", "audio"):
        path: str = getattr(card.model.parts().get(part), "weights", "")
        if path and _holds(claimed, part):
            raise ConfigError(f"model.{part}.weights and model.init_from both hold weights of the part: name one of them")
        if path:
            layers.append(Layer(path, partial(_trained_tensors, path, part, model), prefix=f"{part}."))
    return layers


def _trained_tensors(path: str, part: str, model: MultimodalLM) -> Tensors:
    """Read the file of a part that was trained on top of its base. Raises `ConfigError` for a tensor that the part has not."""
    file = Path(path) / f"{part}.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(
            f"model.{part}.weights = {path!r} " + (f"holds no {file.name}" if Path(path).is_dir() else "does not exist")
        )
    found = {f"{part}.{name}": rows for name, rows in read_weights(file).items()}
    wanted = {name for name, _ in model.named_parameters()}
    if foreign := sorted({*found} - wanted):
        raise ConfigError(
            f"model.{part}.weights = {path!r} holds {listed(foreign)}, which the part has not: it is what --for safetensors of "
            f"tools.export_adapter writes, {part}.safetensors, beside the same model.{part}.path"
        )
    return found


def _holds(names: Collection[str], part: str) -> bool:
    return any(name.startswith(f"{part}.") for name in names)


def _read_elsewhere(card: ModelCard, path: str, part: str) -> tuple[str, ...]:
    """Return words in the names of tensors that lie beside the projector in its file, and that other settings read."""
    vision, adapter = card.model.vision, card.model.llm.adapter
    found = ("vision_tower.",) if vision is not None and Path(vision.path) == _folder(path) else ()
    if part == "vision_projector" and not _is_of_adapter(path):
        return (*found, *ROWS)
    return (*found, *ROWS, "lm_head.") if adapter and Path(adapter) == _folder(path) else found


def _folder(path: str) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _is_of_adapter(path: str) -> bool:
    """Tell whether the projector was trained beside an adapter, whose base has all rows of the vocabulary."""
    file = stored_file(Path(path), "vision_projector")
    return file is not None and file.stem == Path(LLAVA_TRAINED).stem


def _row_layers(card: ModelCard, model: MultimodalLM, path: str, part: str) -> list[Layer]:
    """Return the layer that puts the rows of <im_start> and <im_end>, which lie beside a projector, into the embedding; or none.

    As in LLaVA's second stage, only these two rows of a whole matrix are taken.
    """
    file = stored_file(Path(path), part) if part == "vision_projector" and not _is_of_adapter(path) else None
    stored: Tensors = {} if file is None else read_weights(file)
    rows = next((rows for name, rows in stored.items() if name.endswith(ROWS)), None)
    if rows is None:
        return []
    if card.model.llm.tune not in ("full", "new_tokens"):
        raise ConfigError(
            f"model.{part}.path = {path!r} holds trained rows of {' and '.join(WRAP)}, which model.llm.tune = "
            f"{card.model.llm.tune!r} would not keep: set model.llm.tune = 'new_tokens' or 'full', and model.llm.new_tokens = "
            f"{list(WRAP)}"
        )
    first = rows.shape[0] - len(WRAP)
    last = LazyTensor((len(WRAP), *rows.shape[1:]), lambda a, b: rows.read(first + a, first + b))
    embedding = model.llm.get_input_embeddings().weight  # type: ignore[operator]
    name = next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding)
    return [Layer(path, dict, {name: RowPatch(_wrap_ids(card, path), last)})]


def _wrap_ids(card: ModelCard, path: str) -> tuple[int, ...]:
    """Return the ids of <im_start> and <im_end>, which have to be new tokens. Raises `ConfigError` when they are not."""
    new_ids, added = card.vocabulary.new_ids, card.tokens
    if len(added) != len(new_ids):  # placeholders may be known to the base's tokenizer
        added = tuple(token for token in added if token not in PLACEHOLDERS.values())
    ids = dict(zip(added, new_ids)) if len(added) == len(new_ids) else {}
    if missing := [token for token in WRAP if token not in ids]:
        raise ConfigError(
            f"model.vision_projector.path = {path!r} holds rows of {' and '.join(WRAP)}, but {shown(missing[0])} is no new token: "
            f"set model.llm.new_tokens = {list(WRAP)} and data.media_wrap = {list(WRAP)}, with a base whose tokenizer lacks them"
        )
    return tuple(ids[token] for token in WRAP)


def check_parts_beside(card: ModelCard) -> None:
    """Refuse an adapter without the projector that was trained and stored beside it: with another projector it is useless."""
    projector, folder = card.model.vision_projector, Path(card.lora.path)
    if projector is None or projector.path or card.model.init_from:
        return
    beside = folder / LLAVA_TRAINED
    where, what = (beside, LLAVA_TRAINED) if beside.is_file() else (folder, "saved modules")
    if beside.is_file() or read_saved_projector(folder):
        raise ConfigError(
            f"lora.path = {card.lora.path!r} holds {what} as well, with the projector that was trained beside it: "
            f"name that as model.vision_projector.path = {str(where)!r}"
        )
