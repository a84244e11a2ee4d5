"""Settings of the model: `[model]`, its parts, `[lora]` and `[quantize]` of run.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OUR_ATTENTION = ("sdpa", "varlen")
"""Values of the setting `model.attention` that select our own attention (model/llm/attention.py); `varlen` says rows are packed."""


@dataclass(frozen=True)
class LlmConfig:
    """Settings of the language model, any Hugging Face causal language model."""

    path: str
    tune: Literal["frozen", "lora", "full", "new_tokens"] = "lora"
    new_tokens: tuple[str, ...] = ()
    adapter: str = ""  # a LoRA adapter that is merged into the weights when they are read; lora.path is one that goes on
    dequantize: bool = False  # read an FP8 folder as its matrices times their scales, as transformers with dequantize=True
    router_loss: float = 0.0  # coefficient of the load-balancing loss of a mixture of experts
    lr: float = 0.0  # 0 = optim.lr


@dataclass(frozen=True)
class VisionConfig:
    """Settings of the vision tower, which is cut after the hidden state that is read."""

    path: str
    tune: Literal["frozen", "lora", "full", "positions"] = "frozen"
    layer: int = -2
    select: Literal["patch", "cls_patch"] = "patch"
    image_size: int = 0  # 0 = the tower's own; otherwise its position embeddings are resized
    placeholder: str = ""  # token whose positions take features; "" = <image>
    scales: tuple[int, ...] = ()  # S2: further square sizes, features concatenated on channels
    weights: str = ""  # what was trained on top of `path`: vision.safetensors of an export, or its folder
    lr: float = 0.0


@dataclass(frozen=True)
class VisionProjectorConfig:
    kind: str = "mlp2x_gelu"  # linear | mlpNx_gelu | identity | pixel_shuffle(_v1)_mlp | pool_mlp | conv_mlp | vita_mlp | resampler
    tune: Literal["frozen", "full"] = "full"
    path: str = ""
    queries: int = 0  # resampler: tokens of each view; 0 = 64
    newline: bool = False  # a learned line break behind every line of tiles: for data.image_fit = "anyres"
    lr: float = 0.0  # 0 = optim.projector_lr


@dataclass(frozen=True)
class AudioConfig:
    """Settings of the audio encoder: Whisper's, Qwen2-Audio's or VITA's."""

    path: str
    tune: Literal["frozen", "lora", "full"] = "frozen"
    placeholder: str = ""  # token whose positions take features; "" = <audio>
    window: Literal["full", "clip"] = "full"  # full: every clip padded to the encoder's window | clip: the clip's own frames only
    weights: str = ""  # what was trained on top of `path`: audio.safetensors of an export, or its folder
    lr: float = 0.0


@dataclass(frozen=True)
class AudioProjectorConfig:
    kind: str = "conv_mlp"  # linear | mlpNx_gelu | pool_mlp | conv_mlp | vita_conv
    tune: Literal["frozen", "full", "prompts"] = "full"
    prompts: int = 0  # learned vectors put before every clip
    path: str = ""
    lr: float = 0.0  # 0 = optim.projector_lr


@dataclass(frozen=True)
class StateHeadConfig:
    """Settings of the state head: classes of the user's state, read at the end of every clip."""

    classes: int = 0
    class_weights: tuple[float, ...] = ()  # one per class; () = all 1
    loss_weight: float = 1.0
    tune: Literal["frozen", "full"] = "full"
    path: str = ""
    lr: float = 0.0


PartConfig = LlmConfig | VisionConfig | VisionProjectorConfig | AudioConfig | AudioProjectorConfig | StateHeadConfig


@dataclass(frozen=True)
class QuantizeConfig:
    """Storage of the frozen weights of the language model."""

    bits: Literal[16, 8, 4] = 16
    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True


@dataclass(frozen=True)
class ModelConfig:
    llm: LlmConfig
    vision: VisionConfig | None = None
    vision_projector: VisionProjectorConfig | None = None
    audio: AudioConfig | None = None
    audio_projector: AudioProjectorConfig | None = None
    state_head: StateHeadConfig | None = None
    init_from: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # compute type; trainable parameters are kept in float32
    attention: str = "sdpa"  # sdpa | varlen | eager | any name transformers registers
    cache_dir: str = ""

    def parts(self) -> dict[str, PartConfig]:
        """Return the configured parts by name, in the order data flows through them."""
        names = ("vision", "vision_projector", "audio", "audio_projector", "llm", "state_head")
        return {name: part for name in names if (part := getattr(self, name)) is not None}


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
        """Return the factor on B @ A: alpha / r (Hu et al. 2021), alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
