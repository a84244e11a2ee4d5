"""Checks of a typed configuration: wrong values, settings that contradict each other, and settings that can have no effect."""

from __future__ import annotations

from collections.abc import Iterator

from data.fit_problems import PIXEL_BUDGETS
from model.config import OUR_ATTENTION, LoraConfig
from model.preference.config import PAIRED, PreferenceConfig
from trainer.config import LossScaleConfig, RunConfig, ValidationConfig
from trainer.runfile.limits import is_set, range_problems, unread_settings
from trainer.runfile.optim_checks import optim_problems
from trainer.runfile.part_checks import (
    anyres_problems,
    picture_problems,
    quantize_problems,
    term_problems,
    vision_problems,
)


def problems_of(config: RunConfig) -> list[str]:
    """Return every problem of a well-typed configuration, one line each."""
    return [
        *config.data.problems(),
        *range_problems(config),
        *_pairs(config),
        *_packing(config),
        *_parts(config),
        *vision_problems(config.model),
        *picture_problems(config),
        *anyres_problems(config.data, config.model),
        *term_problems(config.model),
        *choosing_problems(config),
        *quantize_problems(config.quantize, config.model),
        *optim_problems(config),
        *idle_settings(config),
    ]


def _pairs(config: RunConfig) -> Iterator[str]:
    """Yield the settings that contradict each other, one line each."""
    if config.train.epochs is not None and config.train.max_steps is not None:
        yield "train.epochs and train.max_steps are both named: name one"
    if not config.data.sources and config.train.max_steps != 0:
        yield "data.sources is empty: name at least one [[data.sources]] with its path (train.max_steps = 0 needs none)"
    # A micro-batch larger than the step it is part of could never be filled.
    if not config.data.packing and config.batch.micro_batch_size > config.batch.global_batch_size:
        yield (
            f"batch.micro_batch_size = {config.batch.micro_batch_size} is larger than "
            f"batch.global_batch_size = {config.batch.global_batch_size}"
        )
    if config.parallel.strategy == "hsdp" and config.parallel.shard_size < 2:
        yield (
            f"parallel.shard_size = {config.parallel.shard_size} with parallel.strategy = 'hsdp': name the ranks that share one "
            "copy, 2 or more and a divisor of all ranks, as a rule the accelerators of one machine"
        )
    if config.preference.is_on and config.data.packing and config.parallel.compile:
        yield (
            f"parallel.compile = {config.parallel.compile!r} with data.packing = true and [preference]: blocks are not compiled "
            "for answers that share a prompt; set one of the two to false"
        )
    if config.parallel.compile and config.parallel.compute_copies == "always":
        yield (
            f"parallel.compute_copies = 'always' with parallel.compile = {config.parallel.compile!r}: compiled blocks cast their "
            "weights in every forward; use 'auto', or parallel.compile = false"
        )
    if config.checkpoint.resume not in ("auto", "none") and "checkpoint-" not in config.checkpoint.resume:
        yield f"checkpoint.resume = {config.checkpoint.resume!r} is not 'auto' | 'none' | a checkpoint-N folder"


def _packing(config: RunConfig) -> Iterator[str]:
    batch, attention = config.batch, config.model.attention
    if not config.data.packing:
        if attention == "varlen":
            yield "model.attention = 'varlen' is for packed samples: set data.packing = true, or use 'sdpa'"
        return
    if batch.micro_batch_tokens < config.data.max_length:
        yield (
            f"batch.micro_batch_tokens = {batch.micro_batch_tokens} is less than data.max_length = {config.data.max_length}: with "
            "data.packing = true it is the tokens of one micro-batch, which must hold the longest sample"
        )
    if attention not in OUR_ATTENTION:
        yield (
            f"model.attention = {attention!r} with data.packing = true: packed samples would attend to each other; "
            f"use {' or '.join(map(repr, OUR_ATTENTION))}"
        )


def _parts(config: RunConfig) -> Iterator[str]:
    model = config.model
    parts = model.parts()
    for pair in (("vision", "vision_projector"), ("audio", "audio_projector")):
        for one, other in (pair, pair[::-1]):
            if one in parts and other not in parts:
                yield f"[model.{one}] has no effect without [model.{other}]: give both or none"
    tuned = [name for name, part in model.parts().items() if part.tune != "frozen"]
    if not tuned and config.train.max_steps != 0:
        yield "nothing learns: every part has tune = 'frozen' (train.max_steps = 0 writes a model without training)"
    if model.llm.tune == "new_tokens" and not model.llm.new_tokens:
        yield "model.llm.tune = 'new_tokens' trains the rows of model.llm.new_tokens, which names none"
    if model.llm.new_tokens and model.llm.tune not in ("full", "new_tokens"):
        yield (
            f"model.llm.new_tokens = {list(model.llm.new_tokens)} could never be learned with model.llm.tune = {model.llm.tune!r}: "
            "their rows would stay the mean of the others; use tune = 'new_tokens' or 'full', or leave them out "
            "(those of model.init_from stay)"
        )
    for name, projector in (("vision_projector", model.vision_projector), ("audio_projector", model.audio_projector)):
        if projector is not None and projector.tune != "full" and not projector.path and not model.init_from:
            yield f"model.{name}.tune = {projector.tune!r} without weights: name its path, or model.init_from"
    if (audio := model.audio_projector) is not None and audio.tune == "prompts" and audio.prompts == 0:
        yield "model.audio_projector.tune = 'prompts' has nothing to learn: set model.audio_projector.prompts"


def choosing_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of validation.metrics and checkpoint.best, one line each."""
    validation, best = config.validation, config.checkpoint.best
    if len(set(validation.metrics)) < len(validation.metrics):
        yield f"validation.metrics = {list(validation.metrics)} names one twice"
    if validation.metrics and not config.data.validation:
        yield "validation.metrics has no effect without [[data.validation]]: name held-out records"
    if validation.max_new_tokens != ValidationConfig().max_new_tokens and not validation.metrics:
        yield f"validation.max_new_tokens = {validation.max_new_tokens} has no effect without validation.metrics"
    if best and not config.data.validation:
        yield f"checkpoint.best = {best!r} needs [[data.validation]]: name held-out records"
    elif best and not (allowed := best_values(config)).intersection([best]):
        yield f"checkpoint.best = {best!r} is not {' | '.join(map(repr, sorted(allowed)))}"


def best_values(config: RunConfig) -> set[str]:
    """Return every value that the validations of this run have: of all sources together, and of each."""
    prefixes = ["val", *(f"val/{source.key}" for source in config.data.validation)]
    names = ["loss", *config.validation.metrics]
    if config.preference.is_on:
        names.append("preference_loss")
    if config.preference.kind in PAIRED:
        names += ["preference_accuracy", "preference_margin"]
    terms = {"val/state_loss", "val/state_accuracy"} if config.model.state_head is not None else set()
    terms |= {"val/router_loss"} if config.model.llm.router_loss else set()
    return {f"{prefix}/{name}" for prefix in prefixes for name in names} | terms


def idle_settings(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting that has no effect beside the others; the line begins with the key, or with the [table]."""
    model = config.model
    parts = model.parts()
    if config.lora != LoraConfig() and not any(part.tune == "lora" for part in parts.values()):
        yield "[lora] has no effect: no part has tune = 'lora'"
    for name, part in parts.items():
        if part.lr and part.tune == "frozen":
            yield f"model.{name}.lr = {part.lr} has no effect: model.{name}.tune = 'frozen'"
    projectors = {name: part for name, part in parts.items() if name.endswith("_projector")}
    if config.optim.projector_lr and all(part.tune == "frozen" or part.lr for part in projectors.values()):
        why = {n: "it is frozen" if part.tune == "frozen" else "it has an lr of its own" for n, part in projectors.items()}
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items()) or "there is no projector"
        yield f"optim.projector_lr = {config.optim.projector_lr} has no effect: {reasons}"
    batch = config.batch
    if batch.micro_batch_tokens > 0 and not config.data.packing:
        yield f"batch.micro_batch_tokens = {batch.micro_batch_tokens} has no effect with data.packing = false"
    if config.data.packing and is_set(config, "batch.micro_batch_size"):
        yield (
            f"batch.micro_batch_size = {batch.micro_batch_size} has no effect with data.packing = true: "
            "micro-batches are filled up to batch.micro_batch_tokens"
        )
    if config.parallel.strategy != "hsdp" and config.parallel.shard_size:
        yield (
            f"parallel.shard_size = {config.parallel.shard_size} has no effect with parallel.strategy = "
            f"{config.parallel.strategy!r}: it is the ranks that share one copy under 'hsdp'"
        )
    if config.parallel.strategy == "ddp" and not config.parallel.reshard_after_forward:
        yield "parallel.reshard_after_forward = false has no effect with parallel.strategy = 'ddp'"
    if config.parallel.strategy == "ddp" and is_set(config, "parallel.unit_mib"):
        yield f"parallel.unit_mib = {config.parallel.unit_mib} has no effect with parallel.strategy = 'ddp'"
    yield from _unread_media_settings(config)
    if config.data.on_bad_sample == "error" and is_set(config, "data.max_bad_fraction"):
        yield "data.max_bad_fraction has no effect with data.on_bad_sample = 'error': the first bad record stops the run"
    yield from unread_settings(config)
    if config.optim.kind == "sgd" and config.optim.momentum == 0 and is_set(config, "optim.nesterov"):
        yield "optim.nesterov has no effect with optim.momentum = 0"
    if config.loss_scale != LossScaleConfig() and model.dtype != "float16":
        yield f"[loss_scale] has no effect with model.dtype = {model.dtype!r}: it is a table of 'float16'"
    if config.preference != PreferenceConfig() and not config.preference.is_on:
        yield "[preference] has no effect with preference.kind = 'none': name a kind, as 'dpo'"
    wandb = config.log.wandb
    if not wandb.project:
        for name, value, usual in (("name", wandb.name, ""), ("mode", wandb.mode, "online")):
            if value != usual:
                yield f"log.wandb.{name} = {value!r} has no effect: log.wandb.project, the project to log to, is not named"
    if config.validation != ValidationConfig() and not config.data.validation:
        yield "[validation] has no effect without [[data.validation]]"


VISION_SETTINGS = (
    *("media_wrap", "max_images", "max_pixels", "image_fit", "image_decode", "fps", "min_frames", "max_frames"),
    *PIXEL_BUDGETS,
)
"""Settings of [data] that have no effect where no part reads images or videos."""


def _unread_media_settings(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting of [data] about media that no part reads."""
    needed = {"vision": VISION_SETTINGS, "audio": ("max_seconds",), "vision or audio": ("placeholders", "follow_links")}
    for readers, keys in needed.items():
        if not config.model.parts().keys() & set(readers.split(" or ")):
            for key in keys:
                if is_set(config, f"data.{key}"):
                    yield f"data.{key} has no effect: no [model.{readers.replace(' or ', '] or [model.')}] is configured"
