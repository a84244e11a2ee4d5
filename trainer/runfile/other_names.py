"""Names that other trainers give to settings of run.toml: who writes one is told the key here."""

from __future__ import annotations

_ACCUMULATION = "batch.global_batch_size (accumulation follows from it and batch.micro_batch_size)"
_TUNE = 'tune = "frozen", "lora" or "full" of each part, as model.llm.tune and model.vision.tune'
_NAMES = {
    "optim.lr": ("learning_rate", "learning_rates", "base_lr"),
    "optim.projector_lr": ("mm_projector_lr",),
    "optim.schedule": ("lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler"),
    "optim.kind": ("optimizer", "optimizer_type", "optim"),
    "optim.clip_norm": ("max_grad_norm", "gradient_clipping", "grad_clip", "clip_grad_norm", "gradient_clip_val"),
    "optim.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "optim.eps": ("adam_epsilon",),
    "optim.warmup_steps": ("num_warmup_steps",),
    "train.epochs": ("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"),
    "train.max_steps": ("num_steps", "num_train_steps", "max_train_steps", "total_steps"),
    "batch.micro_batch_size (samples at once) or batch.global_batch_size (samples of an update)": (
        "per_device_train_batch_size",
        "train_batch_size",
        "batch_size",
    ),
    "batch.micro_batch_size": ("per_device_batch_size", "train_micro_batch_size_per_gpu", "micro_batch"),
    _ACCUMULATION: ("gradient_accumulation_steps", "gradient_accumulation", "accumulation_steps", "accumulate_grad_batches"),
    "model.dtype": ("bf16", "fp16", "torch_dtype", "mixed_precision", "precision"),
    "model.attention": ("attn_implementation", "attn_impl", "flash_attn", "use_flash_attn"),
    "model.init_from (a whole model) or model.llm.path": (
        "model_name_or_path",
        "name_or_path",
        "model_name",
        "model_path",
        "model_id",
    ),
    "model.vision.path": ("vision_tower", "vision_model", "vision_encoder"),
    "model.vision_projector.kind": ("mm_projector_type", "projector_type"),
    "[model.vision_projector] or [model.audio_projector]": ("projector", "mm_projector", "connector"),
    "model.vision.layer": ("mm_vision_select_layer",),
    "model.vision.select": ("mm_vision_select_feature",),
    _TUNE: (
        *("freeze", "frozen", "trainable", "freeze_backbone", "freeze_llm", "freeze_vision", "freeze_vision_tower", "freeze_vit"),
        *("lora_enable", "use_lora", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
        *("train_type", "tuner_type", "finetuning_type"),
    ),
    "lora.rank": ("r", "lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.targets": ("target_modules", "lora_target", "lora_target_modules"),
    "lora.rslora": ("use_rslora",),
    "quantize.bits": ("load_in_4bit", "load_in_8bit", "quantization_bit", "quant_bits"),
    "[[data.sources]] with a path": ("data_path", "dataset", "datasets", "train_file", "train_data", "train_dataset"),
    "media_root of each [[data.sources]]": ("image_folder", "image_root", "image_dir", "media_dir", "media_folder", "video_folder"),
    "[[data.validation]] with a path": ("eval_data_path", "val_data", "val_dataset", "eval_dataset", "validation_file"),
    "data.max_length": ("model_max_length", "max_seq_length", "max_seq_len", "seq_length", "seq_len", "cutoff_len"),
    "data.image_fit": ("image_aspect_ratio",),
    "data.template": ("chat_template", "conv_mode", "conversation_template"),
    "data.system": ("system_prompt", "system_message"),
    "data.order": ("shuffle", "group_by_length", "group_by_modality_length"),
    "data.workers": ("dataloader_num_workers", "num_workers"),
    "parallel.strategy": ("fsdp", "deepspeed", "zero_stage", "ddp", "sharding_strategy"),
    "parallel.activation_checkpointing": ("gradient_checkpointing", "grad_checkpointing", "use_gradient_checkpointing"),
    "parallel.compile": ("torch_compile",),
    "checkpoint.every": ("save_steps", "save_every", "save_interval"),
    "checkpoint.keep": ("save_total_limit",),
    "checkpoint.resume": ("resume_from_checkpoint", "resume_from"),
    "checkpoint.best": ("load_best_model_at_end", "metric_for_best_model"),
    "log.every": ("logging_steps", "log_steps", "log_interval"),
    "log.tensorboard or [log.wandb]": ("report_to",),
    "validation.every": ("eval_steps", "eval_every", "eval_interval", "val_check_interval"),
    "preference.kind": ("loss_type", "rlhf_type", "pref_loss"),
}
_HERE = {other: key for key, others in _NAMES.items() for other in others}


def own_name(key: str) -> str:
    """Return what run.toml calls the setting that other trainers call `key`; "" if none does."""
    return _HERE.get(key.lower().replace("-", "_"), "")
