"""Measure what a start costs: CPU seconds from the command to the end of step 1, ours by phase, beside Hugging Face's Trainer.

The model and the records are the demo's digits, one process, one thread. Trainer trains LlavaForConditionalGeneration, put together
out of the same two folders, with the image processor and the chat template of these folders. `import torch` alone is the floor of
both. Every start is a process of its own; the three take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tools.cli import command_parser, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from model.files.untrusted import Json

PHASES = {
    "torch": "import torch",
    "transformers": "import transformers' model classes",
    "modules": "import our own modules",
    "open": "read the run file, join ranks, open, index and certify the data",
    "load": "build and load the model, prove gradients; beside it the look at the data",
    "prepare": "rehearse where memory is in doubt, prove that saving works",
    "step": "the first step",
}
"""What each phase of ours is, in order."""
ENDS = {"load": "open", "heaviest": "load", "data": "prepare"}
"""The phase of PHASES that has ended when the run marks a phase of its own for the first time."""
CASES = ("import torch", "ours", "Trainer")


def start_process(case: str, folder: Path) -> dict[str, float]:
    """Start one case in a process of its own; return its CPU seconds by phase, with "total", and seconds and MiB."""
    out = folder / "out"
    command = [sys.executable, "-m", "tools.bench_start", "--child", case, "--folder", str(folder)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    return {key: float(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}


class Clock:
    """CPU seconds of this process by phase."""

    def __init__(self) -> None:
        self.began, self.spent = time.monotonic(), dict[str, float]()

    def ended(self, phase: str) -> None:
        """Note that a phase has ended, unless it had ended before."""
        self.spent.setdefault(phase, time.process_time() - sum(self.spent.values()))

    def report(self) -> None:
        """Print everything as JSON and leave the process."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        total = {"total": used.ru_utime + used.ru_stime, "seconds": time.monotonic() - self.began, "MiB": used.ru_maxrss / 1024}
        print(json.dumps({**self.spent, **total}), flush=True)
        os._exit(0)


def run_case(case: str, folder: Path) -> int:
    """Run one case in this process, until the end of its first step."""
    clock = Clock()
    if case == "ours":
        return start_ours(folder, clock)
    if case == "Trainer":
        start_trainer(folder, clock)
    import torch  # noqa: F401  # here: what is measured

    clock.report()
    return 0


def start_ours(folder: Path, clock: Clock) -> int:
    """Train as the command does."""
    import torch  # noqa: F401  # here and below: each phase of importing by itself

    clock.ended("torch")
    from model.deferred_imports import import_transformers

    import_transformers()
    clock.ended("transformers")
    from trainer import loop
    from trainer.faults.phase_tracker import PhaseTracker
    from trainer.main import main
    from trainer.run import train  # noqa: F401  # as `main` imports it

    clock.ended("modules")
    mark, begin, step = PhaseTracker.mark, PhaseTracker.begin, loop.train_step

    def noted(original: Callable[..., None]) -> Callable[..., None]:
        def call(self: PhaseTracker, phase: str, *args: object) -> None:
            if phase in ENDS:
                clock.ended(ENDS[phase])
            original(self, phase, *args)

        return call

    def first(*args: Any, **options: Any) -> None:
        step(*args, **options)
        clock.ended("step")
        clock.report()

    patches = patch.multiple(PhaseTracker, mark=noted(mark), begin=noted(begin))
    with patches, patch.object(loop, "train_step", first):
        return main(["--cfg", str(folder / "digit.toml"), f"output_dir={folder / 'out'}"])


def build_llava(folder: Path) -> tuple[Any, Any]:
    """Return LlavaForConditionalGeneration out of the demo's parts, and its tokenizer with <image>."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

    llm = AutoModelForCausalLM.from_pretrained(folder / "llm", trust_remote_code=False)
    tower = CLIPVisionModel.from_pretrained(folder / "vision", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm", trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    rows = (tower.config.image_size // tower.config.patch_size) ** 2
    settings = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "image_seq_length": rows, "vision_feature_layer": -1}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower.config, text_config=llm.config, **settings))
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.resize_token_embeddings(-(-len(tokenizer) // 64) * 64)
    return model, tokenizer


def picture_collator(folder: Path, tokenizer: Any, num_rows: int) -> Callable[[list[Json]], dict[str, Tensor]]:
    """Return a function that makes a padded batch of records: the chat template, its prompt not learned, and CLIP's processor."""
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor

    pictures = CLIPImageProcessor.from_pretrained(folder / "vision", trust_remote_code=False)

    def ids_of(turns: list[dict[str, str]], **options: object) -> list[int]:
        return list(tokenizer.apply_chat_template(turns, return_dict=True, **options)["input_ids"])

    def collated(chosen: list[Json]) -> dict[str, Tensor]:
        rows, images = [], []
        for record in chosen:
            asked, said = (turn["value"] for turn in record["conversations"])
            turns = [{"role": "user", "content": asked.replace("<image>", "<image>" * num_rows)}]
            whole = ids_of([*turns, {"role": "assistant", "content": said}])
            rows.append((whole, len(ids_of(turns, add_generation_prompt=True))))
            images.append(Image.open(folder / "images" / record["image"], formats=["PNG"]).convert("RGB"))
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        learned = torch.tensor([[asked <= i < len(row) for i in range(width)] for row, asked in rows])
        mask = torch.tensor([[i < len(row) for i in range(width)] for row, _ in rows]).long()
        pixels = pictures(images, return_tensors="pt")["pixel_values"]
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": ids.masked_fill(~learned, -100)}

    return collated


def start_trainer(folder: Path, clock: Clock) -> None:
    """Train LlavaForConditionalGeneration with Trainer, as its documentation does."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, *args: object, **options: object) -> None:
            clock.report()

    model, tokenizer = build_llava(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=250,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
    )
    records = json.loads((folder / "digit_train.json").read_text())
    batches = picture_collator(folder, tokenizer, model.config.image_seq_length)
    Trainer(model=model, args=arguments, train_dataset=records, data_collator=batches, callbacks=[Stop()]).train()


def compare(options: argparse.Namespace) -> None:
    """Write the demo's parts, measure, print one line per phase and the ratio."""
    from tools.make_demo import make

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(options.times):
            for case in CASES:
                found[case].append(start_process(case, folder))
    medians = {case: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for case, rows in found.items()}
    for key, what in PHASES.items():
        print(f"ours: {what:<75}{medians['ours'][key]:>7.2f}")
    for case, row in medians.items():
        print(f"{case:<14} CPU s {row['total']:6.2f}   s {row['seconds']:6.2f}   MiB {row['MiB']:5.0f}")
    ratios = [a["total"] / b["total"] for a, b in zip(found["ours"], found["Trainer"])]
    print(f"ours / Trainer {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_start", __doc__)
    parser.add_argument("--times", type=int, default=5, help="starts of each case (default 5)")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return run_case(options.child, options.folder)
    return run_command("bench_start", lambda: compare(options))


if __name__ == "__main__":
    raise SystemExit(main())
