"""The other contenders of `tools.bench_train`, around one model of transformers: a bare loop, Trainer and TRL's SFTTrainer.

They read the same records with the library's own chat template, tokenizer and picture processor, and train all of
the model with fused AdamW, on batches padded to their longest sample.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from model.files.untrusted import Json
from tools.benches.meter import COMPUTE, DATA, REST, UPDATE, StepMeter
from tools.benches.mix import CLIP_NORM, LR
from tools.benches.reader import NativeReader, ProcessorReader


@dataclass(frozen=True)
class PeerRun:
    """One contender's run."""

    folder: Path  # of `prepare`
    order: str  # which records, in which order
    batch: int  # samples per step
    accumulate: int  # micro-batches that make a step
    device: str
    meter: StepMeter

    @property
    def micro_batch(self) -> int:
        return self.batch // self.accumulate

    @property
    def is_native(self) -> bool:
        """Tell whether the model reads pictures at their own size."""
        return "qwen2_5_vl" in (self.folder / "hf" / "config.json").read_text(encoding="utf-8")

    def reader(self) -> ProcessorReader:
        """Return the records of the order."""
        from transformers import AutoProcessor

        records = json.loads((self.folder / f"{self.order}.json").read_text(encoding="utf-8"))
        if self.is_native:
            return NativeReader(self.folder, records)
        return ProcessorReader(self.folder, records, AutoProcessor.from_pretrained(self.folder / "hf", trust_remote_code=False))

    def model(self) -> Any:
        """Return the untrained model, float32, on the device."""
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(self.folder / "hf", dtype=torch.float32, trust_remote_code=False)
        return model.to(self.device).train()


def run_bare(task: PeerRun) -> None:
    """Train by the shortest loop: forward, backward, clipping, fused AdamW."""
    reader, model, meter = task.reader(), task.model(), task.meter
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    loader = iter(DataLoader(reader, task.batch, collate_fn=reader.collate))
    bfloat16 = torch.autocast("cuda", torch.bfloat16, enabled=task.device == "cuda")
    while True:
        meter.enter(DATA)
        batch = {name: value.to(task.device, non_blocking=True) for name, value in next(loader).items()}
        meter.enter(COMPUTE)
        with bfloat16:
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        meter.enter(UPDATE)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        meter.end_step(batch["input_ids"].numel(), loss)


def run_trainer(task: PeerRun) -> None:
    """Train by Hugging Face's Trainer, everything optional switched off."""
    from transformers import Trainer, TrainingArguments

    reader = task.reader()
    arguments = TrainingArguments(**trainer_settings(task), remove_unused_columns=False)
    options = {"args": arguments, "train_dataset": reader, "data_collator": reader.collate}
    _train(Trainer, task.meter, model=task.model(), **options)


def run_trl(task: PeerRun) -> None:
    """Train by TRL's SFTTrainer with its own collator, on conversations as it wants them."""
    from trl import SFTConfig, SFTTrainer

    reader = task.reader()
    arguments = SFTConfig(**trainer_settings(task), max_length=None, gradient_checkpointing=False)
    options = {"args": arguments, "train_dataset": _conversations(reader), "processing_class": reader.processor}
    _train(SFTTrainer, task.meter, model=task.model(), **options)


def _conversations(reader: ProcessorReader) -> object:
    """Return the records as prompts, completions and pictures, a data set of the library `datasets`."""
    from datasets import Dataset, Features, Image, List, Value

    def rows() -> Iterator[Json]:
        for i, record in enumerate(reader.records):
            asked, answered = reader.messages(i)
            asked = {**asked, "content": asked["content"].removeprefix("<image>\n")}
            names = [record["image"]] if "image" in record else []
            yield {"prompt": [asked], "completion": [answered], "images": [str(reader.images / name) for name in names]}

    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": List(turn), "completion": List(turn), "images": List(Image())})
    return Dataset.from_list(list(rows()), features=features)


def trainer_settings(task: PeerRun) -> Json:
    """Return the settings of Trainer and SFTTrainer; batches come in the order of the file, which is the order that was planned."""
    return {
        "output_dir": tempfile.mkdtemp(dir=task.folder),
        "max_steps": task.meter.steps,
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.accumulate,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP_NORM,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": task.device == "cpu",
        "bf16": task.device == "cuda",
        "disable_tqdm": True,
        "dataloader_pin_memory": task.device == "cuda",
    }


def _train(trainer_class: type, meter: StepMeter, **options: object) -> None:
    """Build the trainer with the meter told of its phases, and train."""
    from transformers import TrainerCallback

    class Watched(trainer_class):  # type: ignore[misc]
        """The trainer, its phases marked."""

        slots = 0
        loss: Tensor | float = 0.0

        def get_batch_samples(self, *args: object, **options: object) -> object:
            meter.enter(DATA)
            found = super().get_batch_samples(*args, **options)
            meter.enter(REST)
            return found

        def training_step(self, model: object, inputs: dict[str, Tensor], *args: object, **options: object) -> Tensor:
            meter.enter(COMPUTE)
            self.slots += inputs["input_ids"].numel()
            found = super().training_step(model, inputs, *args, **options)
            self.loss = self.loss + found
            meter.enter(UPDATE)
            return found

    class StepEnds(TrainerCallback):
        """Tells the meter when a step has ended."""

        def on_step_end(self, *args: object, **options: object) -> None:
            slots, loss = trainer.slots, trainer.loss
            trainer.slots, trainer.loss = 0, 0.0
            meter.end_step(slots, loss)

    trainer: Any = Watched(callbacks=[StepEnds()], **options)
    trainer.train()
