"""Sections of run.toml that the trainer reads, such as [batch] and [optim], and the root `RunConfig` that holds all sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from data.config import DataConfig
from model.config import LoraConfig, ModelConfig, QuantizeConfig
from model.files.untrusted import Json
from model.preference.config import PreferenceConfig


@dataclass(frozen=True)
class BatchConfig:
    global_batch_size: int = 128
    """Samples of one optimizer step over all ranks; accumulation follows from it. Change it together with optim.lr."""
    micro_batch_size: int = 4
    """Samples that a rank takes through the model at once; lower it when memory is short, raise it for speed: the loss is the
    same."""
    micro_batch_tokens: int = 0
    """Tokens of one packed micro-batch, at least data.max_length; 0 where data.packing = false. Lower it when memory is short."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 2e-5
    """Peak learning rate of all that has no rate of its own; about 2e-5 for full weights, 1e-4 to 4e-4 for LoRA, 1e-3 for a
    new projector alone."""
    projector_lr: float = 0.0
    """Peak learning rate of the projectors; 0 = optim.lr. LLaVA's LoRA uses a tenth of optim.lr for them."""
    weight_decay: float = 0.0
    """Weight decay, never on norms, biases and other vectors; 0 = none, as LLaVA has it; 0.01 to 0.1 for long runs."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments, each in [0, 1); 0.95 to 0.98 as the second where spikes of the loss are a problem."""
    eps: float = 1e-8
    """Number that AdamW adds to the denominator of its update; leave it unless a recipe says otherwise."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient, beyond which it is scaled down; 0 = off."""
    kind: Literal["adamw", "adamw8bit", "muon", "sgd"] = "adamw"
    """Optimizer: adamw; adamw8bit, with a quarter of its state; muon, on the matrices of hidden layers; sgd with momentum."""
    momentum: float = 0.95
    """Decay rate of the momentum of muon and sgd, in [0, 1); 0.9 is usual for sgd."""
    nesterov: bool = True
    """Look one step ahead along the momentum of muon and sgd; false for the plain form."""
    ns_steps: int = 5
    """Newton-Schulz iterations that make an update of muon orthogonal, 1 to 20; leave it unless a recipe says otherwise."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Learning rate of a matrix under muon by its shape: match_rms_adamw takes the rates of AdamW, original such as 0.02."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Course of the learning rate behind the warm-up: constant; linear or cosine down to 0 at the last step; wsd, constant and
    then down to 0 in a decay at the end."""
    warmup_ratio: float | None = None
    """Share of all steps in which the rate rises from 0 to its peak, in [0, 1]; 0.03 where warmup_steps is not named either."""
    warmup_steps: int | None = None
    """Steps in which the rate rises from 0 to its peak, in place of warmup_ratio; 0 = none."""
    decay_ratio: float | None = None
    """Share of all steps at the end in which the rate of wsd falls to 0, in [0, 1]; 0.1 where decay_steps is not named either."""
    decay_steps: int | None = None
    """Steps at the end in which the rate of wsd falls to 0, in place of decay_ratio."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Curve by which the rate of wsd falls."""


@dataclass(frozen=True)
class LossScaleConfig:
    """Loss scaling under model.dtype = "float16": powers of two, so that scaling changes no digit."""

    initial: float = 65536.0
    """Scale of the first step, a power of two; lower it where the first steps are all skipped."""
    growth_interval: int = 2000
    """Updates in a row after which the scale doubles; an overflow halves it."""
    floor: float = 1.0
    """Smallest scale, a power of two: an overflow at it ends the run."""


@dataclass(frozen=True)
class TrainConfig:
    epochs: float | None = None
    """Passes over the data, fractions allowed; 1 where max_steps is not named either. It may be raised when a run is resumed."""
    max_steps: int | None = None
    """Optimizer steps of the run, or stage, in place of epochs; 0 builds and writes the model without training."""
    deterministic: bool = False
    """Use deterministic kernels, so that a resumed run is the same to the bit on CUDA too; costs speed. CPUs need no setting."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """How products of float32 matrices are computed on a GPU: highest in float32, high in TF32, medium in bfloat16; lower ones are
    several times as fast where dtype is float32."""
    rehearsal: Literal["auto", "always"] = "auto"
    """Whether the heaviest micro-batch is run before step 1: auto, only where its memory is in doubt; always."""


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """How ranks share the weights: ddp, each has all; fsdp, each a share (ZeRO-3); hsdp, shares inside a group, copies
    between groups."""
    shard_size: int = 0
    """Ranks that share one copy under hsdp, 2 or more and a divisor of all ranks, as a rule the GPUs of one machine; 0
    otherwise."""
    reshard_after_forward: bool = True
    """Give gathered blocks back after forward and gather them again for backward; false (ZeRO-2) is faster and takes more
    memory."""
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    """What backward recomputes: none; selective, the cheap rest between matrix products; full, every block; auto, the least that
    fits the memory by the plan. More of it saves memory, costs time."""
    compile: bool | Literal["or_eager"] = False
    """Compile blocks with torch.compile, for long runs on a GPU; or_eager: what cannot be compiled runs as it is. Off by default:
    the first start compiles for half a minute or more."""
    cpu_offload: bool = False
    """Keep trained weights, gradients and moments in host memory, and under FSDP2 frozen weights too; for what does not fit the
    device, at the cost of copies in every step."""
    unit_mib: int = 64
    """MiB up to which FSDP2 gathers neighbouring blocks together; larger units cost memory and save collectives, 0 gathers each
    block alone."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over ranks; bfloat16 halves what is sent and costs 2e-3 of a gradient."""
    compute_copies: Literal["auto", "always", "never"] = "auto"
    """Without FSDP2: cast float32 masters once per update into copies that compute, not in every forward; auto does where nothing
    is recomputed, always takes the memory of a copy."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Steps between two checkpoints; a crash costs at most that many. They are written beside training."""
    keep: int = 3
    """Sound checkpoints that stay; older ones are removed once a newer one is proven. Raise it to go back further."""
    best: str = ""
    """Value of the validation whose best checkpoint stays too and becomes best/ at the end, as "val/anls" or "val/loss"; "" = none.
    A validation that is better than all before it saves a checkpoint."""
    resume: str = "auto"
    """Where a start goes on: auto, the newest sound checkpoint of output_dir; none, a fresh start; or a checkpoint-N folder."""


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 500
    """Steps between two validations on [[data.validation]]; the last step has one too."""
    max_samples: int = 512
    """Records of [[data.validation]] that a validation reads at most, the same ones every time; lower it where validations
    take too long."""
    metrics: tuple[Literal["exact_match", "anls", "wer", "choice", "contains", "bleu"], ...] = ()
    """Measures of greedy answers to these records, logged as val/NAME; none = the loss alone. Answering takes far longer than
    the loss."""
    max_new_tokens: int = 64
    """Tokens of an answer at most where there are metrics; raise it where expected answers are longer."""


@dataclass(frozen=True)
class WandbConfig:
    project: str = ""
    """Project of wandb that the run is logged to; '' = not logged to wandb."""
    name: str = ""
    """Name of the run in wandb; '' = one that wandb makes up."""
    mode: Literal["online", "offline"] = "online"
    """online sends as the run goes; offline writes RUN/wandb for `wandb sync`, where a machine reaches no network."""


@dataclass(frozen=True)
class LogConfig:
    every: int = 10
    """Steps between two lines of metrics.jsonl, and on the screen where it is no terminal; step 1 and the last are logged too."""
    tensorboard: bool = False
    """Write all metrics as TensorBoard's event files too, in RUN/tensorboard; needs the extra `track`."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """The run in wandb, one over all resumes; needs the extra `track`."""


@dataclass(frozen=True)
class FaultsConfig:
    max_nonfinite: int = 3
    """Updates in a row that may be skipped for numbers that are not finite before the run ends with code 70."""
    stall_seconds: float = 600.0
    """Seconds without progress after which the run ends and names the rank, its phase and its samples; raise it for very slow
    storage."""
    grace_seconds: float = 120.0
    """Seconds that a run may take from a request to stop until it leaves by itself; keep it below what the launcher grants."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of a curriculum: the settings in which it differs from the first stage."""

    name: str
    """Name of the stage, of a-z, 0-9, _ and -: part of its folder's name and of messages."""
    settings: dict[str, Any]
    """Tables of any section, merged into what stands above the first [[stage]]; arrays replace. What the whole run has cannot
    be set here."""

    def to_tables(self) -> Json:
        """Return the stage as a [[stage]] table of run.toml."""
        return {"name": self.name, **self.settings}


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a whole run. Every section is defined beside the code that reads it; this class only puts them together.

    In a curriculum the sections are those of the first stage.
    """

    output_dir: str
    """Folder of everything that the run writes; the same command on the same folder goes on where it stopped. One run, one
    folder."""
    model: ModelConfig
    """Parts of the model, what of them learns, and what they start from."""
    data: DataConfig = field(default_factory=DataConfig)
    """Records, media, template and order."""
    seed: int = 42
    """Seed of new weights, of the order of the data and of dropout; change it to see how much results vary."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters of the parts whose tune is lora."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """Storage of the frozen language model in few bits."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Size of a step, and of what a rank computes at once."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, learning rates and their schedule."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """Loss scaling of float16."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length of the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work and save memory."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints, and where a start goes on."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation during training; has an effect with [[data.validation]]."""
    log: LogConfig = field(default_factory=LogConfig)
    """How often numbers are logged, and to which trackers beside metrics.jsonl."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """What a run bears before it ends, and how long it waits."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Learning from answers that are preferred to others."""
    stage: tuple[StageConfig, ...] = ()
    """Stages of a curriculum, one after the other, each as [[stage]] with a name and what is different in it."""
