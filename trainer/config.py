"""Sections of run.toml that the trainer reads, such as [batch] and [optim], and the root `RunConfig` that holds all sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from data.config import DataConfig
from model.config import LoraConfig, ModelConfig, QuantizeConfig
from model.files.untrusted import Json


@dataclass(frozen=True)
class BatchConfig:
    global_batch_size: int = 128
    micro_batch_size: int = 4
    micro_batch_tokens: int = 0  # packing: most tokens of a micro-batch


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 2e-5
    projector_lr: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float | None = None  # neither warmup_ratio nor warmup_steps: 0.03
    warmup_steps: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    epochs: float | None = None  # neither epochs nor max_steps: 1 epoch
    max_steps: int | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    shard_size: int = 0  # hsdp: ranks that share one copy
    reshard_after_forward: bool = True
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    compile: bool | Literal["or_eager"] = False  # blocks by torch.compile; or_eager: blocks that cannot be compiled run as they are


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    keep: int = 3
    resume: str = "auto"


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 500
    max_samples: int = 512


@dataclass(frozen=True)
class LogConfig:
    every: int = 10


@dataclass(frozen=True)
class FaultsConfig:
    max_nonfinite: int = 3
    stall_seconds: float = 600.0
    grace_seconds: float = 120.0


@dataclass(frozen=True)
class StageConfig:
    """One stage of a curriculum: the settings in which it differs from the first stage."""

    name: str
    settings: dict[str, Any]

    def to_tables(self) -> Json:
        """Return the stage as a [[stage]] table of run.toml."""
        return {"name": self.name, **self.settings}


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a whole run. Every section is defined beside the code that reads it; this class only puts them together.

    In a curriculum the sections are those of the first stage.
    """

    output_dir: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 42
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    stage: tuple[StageConfig, ...] = ()
