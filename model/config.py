"""Settings of what is computed: `[model]`, its parts and `[lora]` of run.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OUR_ATTENTION = ("sdpa", "varlen")
"""Values of `model.attention` that mean `model.attention` itself; `varlen` says that rows are packed."""


class ConfigError(Exception):
    """A setting, or something a setting names, is wrong."""

    exit_code = 2


@dataclass(frozen=True)
class LlmConfig:
    """Any Hugging Face causal language model."""

    path: str
    tune: Literal["frozen", "lora", "full"] = "lora"
    new_tokens: tuple[str, ...] = ()
    lr: float = 0.0  # 0 = optim.lr


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP tower, cut after the hidden state that is read."""

    path: str
    tune: Literal["frozen", "lora", "full"] = "frozen"
    layer: int = -2
    select: Literal["patch", "cls_patch"] = "patch"
    lr: float = 0.0


@dataclass(frozen=True)
class VisionProjectorConfig:
    kind: str = "mlp2x_gelu"  # linear | mlpNx_gelu | identity
    tune: Literal["frozen", "full"] = "full"
    path: str = ""
    lr: float = 0.0  # 0 = optim.projector_lr


@dataclass(frozen=True)
class ModelConfig:
    llm: LlmConfig
    vision: VisionConfig | None = None
    vision_projector: VisionProjectorConfig | None = None
    init_from: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; what trains keeps float32 masters
    attention: str = "sdpa"  # sdpa | varlen | eager | any name transformers registers
    cache_dir: str = ""

    def parts(self) -> dict[str, LlmConfig | VisionConfig | VisionProjectorConfig]:
        """Configured parts by name, in the order data flows through them."""
        named = {"vision": self.vision, "vision_projector": self.vision_projector, "llm": self.llm}
        return {name: part for name, part in named.items() if part is not None}


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    bias: Literal["none", "all", "lora_only"] = "none"
    targets: str | tuple[str, ...] = field(default="all-linear")
    rslora: bool = False
    path: str = ""

    @property
    def scale(self) -> float:
        """Factor on B @ A: alpha / r (Hu et al. 2021), alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
