"""Measurement of Hugging Face's Trainer on the 0.5B shape: the same samples, padded, the same attention, the same parts tuned."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from data.collate import collate
from data.sample import Sample
from tools.devicechecks.batches import mixed_samples
from tools.devicechecks.flops import useful_flops
from tools.devicechecks.models import Recipe, build, card_of, run_config
from tools.devicechecks.outcome import CheckResult, Context, Figure, Skipped
from tools.devicechecks.shapes import HALF_B, TINY, ModelShape
from tools.devicechecks.speed import Load, describe, half_dtype, measure_training, rates, synchronise
from trainer.config import OptimConfig
from trainer.distributed.world import stop_world

ROWS, STEPS, WARM_UP = 8, 10, 3
"""Samples of a step, steps that are timed, and steps before them."""


def measure_trainer(context: Context) -> CheckResult:
    """Train with Trainer and with ours, and compare their useful tokens per second."""
    try:
        from transformers import Trainer  # noqa: F401
    except ImportError as error:
        raise Skipped(f"transformers' Trainer cannot be imported: {error}") from error
    if not context.on_gpu and not context.tiny:
        raise Skipped("for a GPU; --tiny measures a small shape")
    shape, rows = (TINY, 4) if context.tiny else (HALF_B, ROWS)
    card = card_of(run_config(shape, Recipe(), context))
    samples = mixed_samples(card, rows * (STEPS + WARM_UP), longest=60 if context.tiny else 0)
    stop_world()  # Trainer would take this process's group for one of its own
    try:
        seconds = trainer_seconds(shape, samples, rows, context)
    except torch.OutOfMemoryError as error:
        raise Skipped("Trainer ran out of memory") from error
    timed = [collate(samples[start : start + rows], 0) for start in range(WARM_UP * rows, len(samples), rows)]
    recipe = Recipe(dtype=half_dtype(context), optim=OptimConfig(lr=1e-5))
    model = build(shape, recipe, context, made_on=context.device).model
    theirs = rates(timed, seconds, sum(useful_flops(model, batch).total for batch in timed), context)
    del model
    if context.on_gpu:
        torch.cuda.empty_cache()
    ours = measure_training(Load(shape, "full"), False, context).figures
    ratio = float(ours["tokens_per_second"]) / float(theirs["tokens_per_second"])
    figures: dict[str, Figure] = {f"trainer_{key}": value for key, value in theirs.items()}
    return CheckResult(
        True, f"ours {ratio:.2f} times as fast; Trainer: {describe(theirs)}", {"ours_over_trainer": ratio, **figures}
    )


def trainer_seconds(shape: ModelShape, samples: list[Sample], rows: int, context: Context) -> float:
    """Return the seconds that Trainer takes for all steps after the first `WARM_UP`."""
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            if state.global_step in (WARM_UP, WARM_UP + STEPS):
                synchronise(context.device)
                marks.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(context.folder / "peer"),
        max_steps=WARM_UP + STEPS,
        per_device_train_batch_size=rows,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        bf16=half_dtype(context) == "bfloat16",
        use_cpu=not context.on_gpu,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0 if context.tiny else 2,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # it would share one batch among all cards
    model = library_model(shape, context)
    trainer = Trainer(model=model, args=arguments, train_dataset=list(samples), data_collator=padded, callbacks=[Clock()])
    trainer.train()
    return marks[1] - marks[0]


def library_model(shape: ModelShape, context: Context) -> torch.nn.Module:
    """Return transformers' LLaVA of the shape with made-up weights and a frozen tower."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    llm = {key: value for key, value in shape.llm_config().items() if key not in ("model_type", "architectures")}
    vision = {key: value for key, value in shape.vision_config().items() if key != "model_type"}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=Qwen2Config(**llm),
        image_token_index=1,
        vision_feature_layer=-2,
        attn_implementation="sdpa",
    )
    with context.device:
        model = LlavaForConditionalGeneration(config)
    model.get_submodule("model.vision_tower").requires_grad_(False)
    return model


def padded(samples: list[Sample]) -> dict[str, Tensor]:
    """Return the samples as LLaVA of transformers takes them: its own token where features go, labels that it shifts itself."""
    batch = collate(samples, 0)
    ids = batch.input_ids.clone()
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = batch.labels[:, :-1]
    media = batch.media.get("image")
    mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if media is not None:
        ids.view(-1)[media.slots] = 1
        found["pixel_values"] = media.values.float() / 255
    return found
