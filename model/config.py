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
    """Causal language model: a Hugging Face folder or hub id, also a published vision-language model that holds one."""
    tune: Literal["frozen", "lora", "full", "new_tokens"] = "lora"
    """What learns: frozen, nothing; lora, adapters; full, everything; new_tokens, the rows of new_tokens alone."""
    new_tokens: tuple[str, ...] = ()
    """Special tokens to add, each with a row that starts as the mean of the others; with tune = 'new_tokens' or 'full'."""
    adapter: str = ""
    """LoRA adapter, ours or of PEFT, that is merged into the weights when they are read; lora.path is one that goes on learning."""
    dequantize: bool = False
    """Read an FP8 folder as its matrices times their scales, as transformers does with dequantize=True; other quantised
    folders are refused."""
    router_loss: float = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts; 0 = none, 0.001 to 0.02 are usual."""
    lr: float = 0.0
    """Peak learning rate of the language model; 0 = optim.lr."""
    image_attention: Literal["causal", "two_way"] = "causal"
    """Attention between tokens of one picture: causal, to earlier ones alone; two_way, to all of them, as Gemma 3 was trained."""


@dataclass(frozen=True)
class VisionConfig:
    """Settings of the vision tower, which is cut after the hidden state that is read."""

    path: str
    """Vision tower, CLIP, SigLIP, DINOv2 or InternViT, or for pictures at their own size SigLIP2 NaFlex, Pixtral,
    Qwen-VL's or GLM-4.1V's: a Hugging Face folder or hub id. It is cut after the hidden state that is read."""
    tune: Literal["frozen", "lora", "full", "positions"] = "frozen"
    """What learns: frozen, nothing; lora, adapters; full, everything; positions, the position embeddings alone."""
    layer: int = -2
    """Hidden state that is read: -1 the last, -2 the last but one (LLaVA); 0 and up count from the embeddings."""
    select: Literal["patch", "cls_patch"] = "patch"
    """Rows that are read: patch, without the CLS row; cls_patch, with it."""
    image_size: int = 0
    """Side of the square that the tower sees, in pixels; 0 = the tower's own; otherwise its position embeddings are resized."""
    placeholder: str = ""
    """Token whose positions take the features; '' = <image>. Set it for a model that was trained with another one."""
    video_placeholder: str = ""
    """Token whose positions take the features of videos, for a tower that reads pictures at their own size; '' = placeholder."""
    line_ends: tuple[str, ...] = ()
    """Tokens behind each line of a picture's features and behind its last one, as ['[IMG_BREAK]', '[IMG_END]'] (Pixtral), for a
    tower that reads pictures at their own size; () = none."""
    video_stamps: tuple[str, ...] = ()
    """Tokens before and after each pair of frames of a video, behind its time as text, as ['<|vision_start|>', '<|vision_end|>']
    (Qwen3-VL: <0.5 seconds><|vision_start|>...<|vision_end|>), or in front of it where the model's processor writes it there
    (GLM-4.1V), for a tower that reads pictures at their own size; () = no times."""
    scales: tuple[int, ...] = ()
    """S2: further square sizes in pixels at which every picture is seen too, features side by side; () = none."""
    weights: str = ""
    """What was trained on top of path: vision.safetensors of an export, or its folder; '' = nothing."""
    lr: float = 0.0
    """Peak learning rate of the tower; 0 = optim.lr. A tenth of it or less is usual where the tower learns."""
    final_norm: bool = False
    """Read the last block's rows behind the norm that follows it, as Gemma 3 does; for SigLIP with layer = -1 alone."""


@dataclass(frozen=True)
class VisionProjectorConfig:
    kind: str = "mlp2x_gelu"
    """What maps features to the language model: linear, mlpNx_gelu, identity, pixel_shuffle_mlp, pixel_shuffle_v1_mlp,
    pool_mlp, conv_mlp, vita_mlp, pixel_shuffleN_linear or poolN_norm_linear (N x N patches to a token, 2 to 4) or resampler; with
    a tower of variable size, the first three, pixel_shuffle_mlp, pool_mlp or a published model's merger."""
    tune: Literal["frozen", "full"] = "full"
    """What learns: frozen, nothing; full, everything."""
    path: str = ""
    """Weights to start from: ours, LLaVA's mm_projector.bin or non_lora_trainables.bin, or a published model; '' = new ones."""
    queries: int = 0
    """Tokens that a resampler makes of each view; 0 = 64. For kind = 'resampler' alone."""
    newline: bool = False
    """Learn a line break behind every line of tiles; data.image_fit = 'anyres' needs it."""
    lr: float = 0.0
    """Peak learning rate of this projector; 0 = optim.projector_lr."""


@dataclass(frozen=True)
class AudioConfig:
    """Settings of the audio encoder: Whisper's, Qwen2-Audio's or VITA's."""

    path: str
    """Audio encoder of a Whisper, a Qwen2-Audio or a VITA: a folder or hub id."""
    tune: Literal["frozen", "lora", "full"] = "frozen"
    """What learns: frozen, nothing; lora, adapters; full, everything."""
    placeholder: str = ""
    """Token whose positions take the features; '' = <audio>. Set it for a model that was trained with another one."""
    window: Literal["full", "clip"] = "full"
    """full: every clip is padded to the encoder's window, as Whisper was trained; clip: its own frames only, up to 30 times
    cheaper, other features."""
    weights: str = ""
    """What was trained on top of path: audio.safetensors of an export, or its folder; '' = nothing."""
    lr: float = 0.0
    """Peak learning rate of the encoder; 0 = optim.lr."""


@dataclass(frozen=True)
class AudioProjectorConfig:
    kind: str = "conv_mlp"
    """What maps frames to the language model: linear, mlpNx_gelu, pool_mlp, conv_mlp or vita_conv."""
    tune: Literal["frozen", "full", "prompts"] = "full"
    """What learns: frozen, nothing; full, everything; prompts, the learned vectors alone."""
    prompts: int = 0
    """Learned vectors put before every clip; 0 = none."""
    path: str = ""
    """Weights to start from: ours, or a published model; '' = new ones."""
    lr: float = 0.0
    """Peak learning rate of this projector; 0 = optim.projector_lr."""


@dataclass(frozen=True)
class StateHeadConfig:
    """Settings of the state head: classes of the user's state, read at the end of every clip."""

    classes: int = 0
    """Number of classes of the user's state, which records name as audio_state; 2 or more."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss, all positive; () = all 1. Raise that of a rare class."""
    loss_weight: float = 1.0
    """Weight of this loss beside that of the text; lower it where the text suffers."""
    tune: Literal["frozen", "full"] = "full"
    """What learns: frozen, nothing; full, everything."""
    path: str = ""
    """Weights to start from: a final/ of ours, or state_head.safetensors; '' = new ones."""
    lr: float = 0.0
    """Peak learning rate of the head; 0 = optim.lr."""


PartConfig = LlmConfig | VisionConfig | VisionProjectorConfig | AudioConfig | AudioProjectorConfig | StateHeadConfig


@dataclass(frozen=True)
class QuantizeConfig:
    """Storage of the frozen weights of the language model."""

    bits: Literal[16, 8, 4] = 16
    """Bits of each frozen matrix of the language model: 16 = as it is; 8 or 4 (QLoRA) where memory is short; needs bitsandbytes."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Values that 4 bits stand for: nf4, quantiles of a normal distribution, or fp4. nf4 is the better one for weights."""
    double: bool = True
    """Store the scales of 4-bit blocks in 8 bits too, which saves 0.4 bits per weight."""


@dataclass(frozen=True)
class ModelConfig:
    llm: LlmConfig
    """Language model; every run has one."""
    vision: VisionConfig | None = None
    """Tower that sees pictures and frames; needs [model.vision_projector]."""
    vision_projector: VisionProjectorConfig | None = None
    """Map from the tower's features to the language model."""
    audio: AudioConfig | None = None
    """Encoder that hears clips; needs [model.audio_projector]."""
    audio_projector: AudioProjectorConfig | None = None
    """Map from the encoder's frames to the language model."""
    state_head: StateHeadConfig | None = None
    """Classes of the user's state, read at the end of every clip; needs [model.audio]."""
    init_from: str = ""
    """Weights to start from: a final/ or checkpoint-N of ours, to go on with other settings, or a published model, which
    gives the parts too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of numbers in the computation; auto = bfloat16 on CUDA, float32 elsewhere; float16, with [loss_scale], for GPUs
    without bfloat16. What learns is kept in float32."""
    attention: str = "sdpa"
    """Kernel of attention: sdpa, ours; varlen, ours for packed samples; eager, or any name that transformers registers."""
    cache_dir: str = ""
    """Folder in which files of the hub are kept; '' = Hugging Face's own."""

    def parts(self) -> dict[str, PartConfig]:
        """Return the configured parts by name, in the order data flows through them."""
        names = ("vision", "vision_projector", "audio", "audio_projector", "llm", "state_head")
        return {name: part for name in names if (part := getattr(self, name)) is not None}


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 64
    """Rank r of the two matrices of each adapter; 8 to 128 are usual, more learns more and takes more memory."""
    alpha: float = 16.0
    """Scale of the adapters: their product counts alpha / rank times (alpha / sqrt(rank) with rslora); often the rank, or
    twice that."""
    dropout: float = 0.05
    """Share of an adapter's input that is dropped in training, in [0, 1); 0 = none."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that learn too: none; all; lora_only, those of adapted layers."""
    targets: str | tuple[str, ...] = field(default="all-linear")
    """Layers that are adapted: all-linear, or patterns of full paths such as 'llm.*.q_proj'; each must match something."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank, so that large ranks keep their effect."""
    path: str = ""
    """Adapter to go on from: ours, or a PEFT folder; '' = a new one."""

    @property
    def scale(self) -> float:
        """Return the factor on B @ A: alpha / r (Hu et al. 2021), alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
