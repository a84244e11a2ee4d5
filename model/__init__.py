"""The model package. Its public names load lazily, so that data workers can import `model.batch` without LoRA and transformers."""

from importlib import import_module
from typing import Any

_HOMES = {"MultimodalLM": "model.multimodal", "build_model": "model.build", "load_model": "model.load"}
__all__ = ["MultimodalLM", "build_model", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
