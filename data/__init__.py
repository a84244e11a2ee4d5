"""Reading of training data. The public names are imported lazily: naming one costs nothing until it is used."""

from typing import Any

__all__ = ["Processor", "load_processor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from data import processor

        return getattr(processor, name)
    raise AttributeError(f"module 'data' has no attribute {name!r}")
