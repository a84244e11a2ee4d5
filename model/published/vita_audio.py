"""VITA's sound encoder as it is published: train.yaml, global_cmvn and final.pt in a folder of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from model.files.untrusted import Json
from model.published.layout import Published
from model.published.plain_yaml import Unread, read_plain_yaml

SETTINGS, STATISTICS, WEIGHTS = "train.yaml", "global_cmvn", "final.pt"
REQUIRED = {
    "encoder_conf.overview_conf.encoder-layer-config": ("subsampling-transformer",),
    "encoder_conf.para_conf.subsampling.subsampling-rate": (4,),
    "encoder_conf.para_conf.transformer.transformer-input-layer": ("linear",),
    "encoder_conf.para_conf.transformer.transformer-concat-after": (False,),
    "encoder_conf.para_conf.transformer.transformer-positionwise-layer-type": ("linear",),
    "encoder_conf.para_conf.transformer.transformer-pos-enc-class": ("rel-enc", "abs-enc"),
}
"""Values that the encoder here can have, by key of train.yaml."""
ADAPTERS: dict[str, tuple[str, Json]] = {
    "subsampling": ("vita_conv", {"kernel_size": 5, "norm": "layer", "activation_func": "gelu"}),
    "linear": ("linear", {}),
}
"""Kind of audio projector of an adapter, and the values that it must have in train.yaml."""
DEFAULTS = {
    "transformer-input-layer": "linear",
    "transformer-concat-after": False,
    "transformer-positionwise-layer-type": "linear",
    "transformer-pos-enc-class": "abs-enc",
    "transformer-normalize-before": True,
    "transformer-dynamic-chunks": True,
    "transformer-chunk_size": -1,
    "transformer-left_chunks": -1,
    "transformer-dropout-rate": 0.1,
    "transformer-attention-dropout-rate": 0.0,
    "transformer-positional-dropout-rate": 0.1,
    "subsampling-rate": 4,
    "adpter_type": "cnn",
    "kernel_size": 3,
    "norm": "batch",
    "activation_func": "relu",
    "add_audio_bos_eos": False,
    "is_json_cmvn": False,
}
"""What VITA takes where train.yaml says nothing, by the last word of a key."""


def train_settings(source: Published) -> Callable[[str], Any]:
    """Return a reader of train.yaml by dotted key, which raises `ConfigError` for a key that is missing or is not plain."""
    text = source.text(SETTINGS)
    whole = read_plain_yaml(text)

    def read(key: str) -> Any:
        value: Any = whole
        for word in key.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        if isinstance(value, Unread):
            raise source.refused(f"{SETTINGS} line {value.line}: {key} has a form that is not read: write it as {key}: value")
        if value is None and (word := key.rpartition(".")[2]) in DEFAULTS:
            return DEFAULTS[word]
        if value is None:
            raise source.refused(f"{SETTINGS} has no {key}" if text else f"holds no {SETTINGS}")
        return value

    return read


def whale_settings(source: Published) -> Json:
    """Return config.json of the encoder, `model.audio.whale`, with its features and the statistics of its training data."""
    read = train_settings(source)
    for key, allowed in REQUIRED.items():
        if (value := read(key)) not in allowed:
            raise source.refused(f"{SETTINGS}: {key} = {value!r} is not supported; it must be {' or '.join(map(repr, allowed))}")
    here, feature = "encoder_conf.para_conf.transformer.transformer", "dataset_conf.fbank_conf"
    bands = read(f"{feature}.num_mel_bins")
    means, scales = read_statistics(source, read("is_json_cmvn"), bands)
    # With dynamic chunks VITA draws their size anew for every call; a chunk as long as the clip is the one that stays the same.
    chunk = 0 if read(f"{here}-dynamic-chunks") else max(0, read(f"{here}-chunk_size"))
    return {
        "model_type": "whale",
        "num_mel_bins": bands,
        "subsampled_size": read("encoder_conf.para_conf.subsampling.subsampling-output-dim"),
        "hidden_size": read(f"{here}-attention-dim"),
        "num_hidden_layers": read(f"{here}-num-blocks"),
        "num_attention_heads": read(f"{here}-attention-heads"),
        "intermediate_size": read(f"{here}-linear-units"),
        "relative_positions": read(f"{here}-pos-enc-class") == "rel-enc",
        "normalize_before": read(f"{here}-normalize-before"),
        "chunk_size": chunk,
        "left_chunks": read(f"{here}-left_chunks"),
        "dropout": read(f"{here}-dropout-rate"),
        "attention_dropout": read(f"{here}-attention-dropout-rate"),
        "positional_dropout": read(f"{here}-positional-dropout-rate"),
        "sampling_rate": read("dataset_conf.resample_conf.resample_rate"),
        "frame_length": read(f"{feature}.frame_length"),
        "frame_shift": read(f"{feature}.frame_shift"),
        "dither": read(f"{feature}.dither"),
        "cmvn_means": means,
        "cmvn_istds": scales,
    }


def adapter_kind(source: Published) -> str:
    """Return the kind of audio projector that the adapter is. Raises `ConfigError` for one that is not supported."""
    read = train_settings(source)
    kind = read("model_conf.adpter_type")
    if kind not in ADAPTERS:
        why = "it normalises by statistics of its batch" if kind == "cnn" else "it is unknown"
        raise source.refused(f"{SETTINGS}: model_conf.adpter_type = {kind!r} is not supported: {why}")
    name, needed = ADAPTERS[kind]
    for key, value in {**needed, "add_audio_bos_eos": False}.items():
        if (found := read(f"model_conf.{key}")) != value:
            raise source.refused(
                f"{SETTINGS}: model_conf.{key} = {found!r} is not supported; VITA's published models have {value!r}"
            )
    return name


def read_statistics(source: Published, is_json: bool, bands: int) -> tuple[list[float], list[float]]:
    """Return mean and 1 / standard deviation of each band, out of the sums over all frames in global_cmvn."""
    sums, squares, count = (_json_sums if is_json else _kaldi_sums)(source)
    if len(sums) != bands or len(squares) != bands or count <= 0:
        raise source.refused(f"{STATISTICS} holds sums of {len(sums)} and {len(squares)} bands, and {SETTINGS} makes {bands}")
    means = [total / count for total in sums]
    variances = [max(square / count - mean * mean, 1e-20) for square, mean in zip(squares, means)]
    return means, [1 / math.sqrt(variance) for variance in variances]


def _json_sums(source: Published) -> tuple[list[float], list[float], float]:
    try:
        found = json.loads(source.text(STATISTICS))
        return [float(x) for x in found["mean_stat"]], [float(x) for x in found["var_stat"]], float(found["frame_num"])
    except (ValueError, KeyError, TypeError) as error:
        raise source.refused(f"{STATISTICS} is not the JSON that is_json_cmvn announces: {error}") from error


def _kaldi_sums(source: Published) -> tuple[list[float], list[float], float]:
    """Read Kaldi's text form: [ sums, number of frames, sums of squares, 0 ]."""
    words = source.text(STATISTICS).split()
    if len(words) < 4 or words[0] != "[" or words[-1] != "]" or len(words) % 2:
        raise source.refused(f"{STATISTICS} is missing, or is no statistics in Kaldi's text form")
    try:
        numbers = [float(word) for word in words[1:-1]]
    except ValueError as error:
        raise source.refused(f"{STATISTICS}: {error}") from error
    half = len(numbers) // 2
    return numbers[: half - 1], numbers[half:-1], numbers[half - 1]
