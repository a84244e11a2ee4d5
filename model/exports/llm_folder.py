"""Export of the language model as a Hugging Face folder: the base of an adapter when an earlier run trained the language model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from model.build import assemble
from model.card import ModelCard
from model.exports.hugging_face import write_weights
from model.files.tensor_files import Entry, dump_json, in_memory
from model.llm.quantized_linear import STORED, quantised
from model.load import load_model
from model.lora import is_adapter
from model.multimodal import MultimodalLM
from model.weights.materialise import kept_buffers
from model.weights.origins import run_layers


def inherited_parts(folder: Path, card: ModelCard) -> set[str]:
    """Return the parts in which an earlier run trained or merged a weight; an adapter of this run does not fit their plain base."""
    below = run_layers(folder, card, assemble(card, torch.float32), "SOURCE")[1:]
    names = {name for layer in below for name in (*layer.tensors, *layer.adapters, *layer.stored)}
    merged = {"llm"} if card.model.llm.adapter else set()
    return merged | {name.partition(".")[0] for name in names if not is_adapter(name)}


def write_llm(source: Path, folder: Path, card: ModelCard) -> None:
    """Write config.json, model*.safetensors and generation_config.json of the language model of `source`, without its own adapters.

    Matrices that are stored quantised are written dequantised, as the model computes with them.
    """
    model: MultimodalLM = load_model(source, merge_lora=False)
    plain = {n: p.detach() for n, p in model.llm.named_parameters() if not is_adapter(n) and not n.endswith(STORED)}
    entries = {n: Entry(model.dtype, tuple(p.shape), in_memory(p).all) for n, p in plain.items()}
    for path, layer in quantised(model.llm):
        entries[f"{path}.weight"] = Entry(model.dtype, layer.shape, partial(layer.matrix, model.dtype))
    buffers = {name: module.get_buffer(key) for name, module, key in kept_buffers(model.llm)}
    entries |= {name: Entry(value.dtype, tuple(value.shape), in_memory(value).all) for name, value in buffers.items()}
    write_weights(folder, entries)
    rows = model.llm.get_input_embeddings().weight.shape[0]
    dtype = str(model.dtype).removeprefix("torch.")
    config = {**card.hugging_face["llm"], "vocab_size": rows, "dtype": dtype, "architectures": [type(model.llm).__name__]}
    (folder / "config.json").write_text(dump_json(config))
    stops = {"eos_token_id": list(card.stop_ids), "pad_token_id": card.pad_id}
    (folder / "generation_config.json").write_text(dump_json(stops))
