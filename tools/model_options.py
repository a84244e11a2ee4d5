"""Options of the command lines that use a trained model: its folder, its device, and the places of its base models."""

from __future__ import annotations

import argparse

import torch

from model.errors import ConfigError
from model.load import load_model
from model.multimodal import MultimodalLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("final", metavar="FINAL", help="a final/ folder or a checkpoint-N of a run")
    add_place_options(parser)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_model_options` but the folder."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    moved = "where a base model stands now, if it moved: --base llm=/models/qwen; PART is llm, vision, audio or init_from"
    parser.add_argument("--base", metavar="PART=PATH", action="append", default=[], help=moved)


def load(options: argparse.Namespace) -> MultimodalLM:
    """Load the model that the options of `add_model_options` name, adapters merged. Raises `ConfigError`."""
    if bad := [text for text in options.base if not all(text.partition("="))]:
        raise ConfigError(f"--base {bad[0]!r} is not PART=PATH")
    base = dict(text.split("=", 1) for text in options.base)
    return load_model(options.final, _device(options.device), base=base)


def _device(name: str) -> torch.device:
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device: write cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
