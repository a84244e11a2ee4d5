"""The files of VITA's sound encoder: the settings and the statistics that its code builds the encoder from."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.card import ModelCard
from model.files.tensor_files import Entry
from model.media_spec import AudioSpec
from model.multimodal import MultimodalLM

ADAPTERS = {"vita_conv": "subsampling", "linear": "linear"}
"""VITA's names of the kinds of audio projectors."""


def band_statistics(card: ModelCard) -> dict[str, Entry]:
    """Return the means and 1 / deviations of the bands, which VITA keeps as buffers too."""
    spec = card.specs.get("audio")
    if not isinstance(spec, AudioSpec):
        return {}
    numbers = {"mean": torch.tensor(spec.means), "istd": torch.tensor(spec.scales)}
    return {name: Entry(torch.float32, tuple(rows.shape), partial(Tensor.clone, rows)) for name, rows in numbers.items()}


def train_yaml(card: ModelCard, model: MultimodalLM) -> str:
    """Return the settings of the sound encoder as VITA reads them."""
    value, adapter = card.hugging_face["audio"], card.model.audio_projector
    assert adapter is not None
    bands, width, llm = value["num_mel_bins"], value["hidden_size"], model.llm
    banks = {"frame_length": value.get("frame_length", 25), "frame_shift": value.get("frame_shift", 10), "num_mel_bins": bands}
    subsampling = {"input-dim": bands, "output-dim": value["subsampled_size"], "rate": 4, "dropout-rate": 0.0}
    order = {"input-dim": bands, "layer-config": "subsampling-transformer", "output-dim": width}
    components = {"subsampling": subsampling, "transformer": _transformer(value)}
    return _yaml(
        {
            "dataset_conf": {
                "fbank_conf": {"dither": value.get("dither", 0.0), **banks},
                "resample_conf": {"resample_rate": value.get("sampling_rate", 16_000)},
            },
            "encoder_conf": {
                "overview_conf": _prefixed("encoder", order),
                "para_conf": {name: _prefixed(name, settings) for name, settings in components.items()},
            },
            "input_dim": bands,
            "is_json_cmvn": True,
            "model_conf": {
                "activation_func": "gelu",
                "adpter_type": ADAPTERS[adapter.kind],
                "enc_out_dim": width,
                "kernel_size": 5,
                "llm_embed_dim": llm.get_input_embeddings().embedding_dim,  # type: ignore[operator]
                "llm_path": "none",
                "norm": "layer",
            },
        }
    )


def _transformer(value: dict[str, Any]) -> dict[str, Any]:
    """Return VITA's settings of the blocks; `value`: config.json of the encoder."""
    return {
        "attention-dim": value["hidden_size"],
        "attention-dropout-rate": value.get("attention_dropout", 0.0),
        "attention-heads": value["num_attention_heads"],
        "chunk_size": value.get("chunk_size", 0) or -1,
        "concat-after": False,
        "dropout-rate": value.get("dropout", 0.0),
        "dynamic-chunks": False,
        "input-dim": value["subsampled_size"],
        "input-layer": "linear",
        "left_chunks": value.get("left_chunks", -1),
        "linear-units": value["intermediate_size"],
        "normalize-before": value.get("normalize_before", True),
        "num-blocks": value["num_hidden_layers"],
        "output-dim": value["hidden_size"],
        "pos-enc-class": "rel-enc" if value.get("relative_positions", True) else "abs-enc",
        "positional-dropout-rate": value.get("positional_dropout", 0.0),
        "positionwise-layer-type": "linear",
    }


def _prefixed(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}-{key}": value for key, value in settings.items()}


def _yaml(values: dict[str, Any], indent: str = "") -> str:
    """Return nested maps of plain scalars as YAML."""
    found = ""
    for key, value in values.items():
        if isinstance(value, dict):
            found += f"{indent}{key}:\n{_yaml(value, indent + '  ')}"
        else:
            found += f"{indent}{key}: {str(value).lower() if isinstance(value, bool) else value}\n"
    return found


def band_sums(card: ModelCard) -> dict[str, Any]:
    """Return global_cmvn in its JSON form: sums over one frame that has the means and variances of all."""
    means, scales = card.hugging_face["audio"]["cmvn_means"], card.hugging_face["audio"]["cmvn_istds"]
    squares = [1 / (scale * scale) + mean * mean for mean, scale in zip(means, scales, strict=True)]
    return {"mean_stat": means, "var_stat": squares, "frame_num": 1}
