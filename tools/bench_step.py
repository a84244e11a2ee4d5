"""Measure what a step costs beside the model: our loop, a bare loop, and Hugging Face's Trainer, around the same wrapped model.

Counts are exact and repeat: host syncs, operators dispatched, Python and C calls, each per step in a steady state (the difference
of a long and a short run). CPU seconds are medians of interleaved rounds.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from data.collate import collate
from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX, Batch
from model.build import build_model
from model.config import LlmConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.media_spec import MediaMeta, image_spec, num_tokens
from model.multimodal import MultimodalLM
from tools.benches.turns import cpu_time, in_turns
from tools.cli import command_parser
from tools.make_demo import CORPUS, VOCAB, train_tokenizer, write_parts
from trainer.config import OptimConfig
from trainer.distributed.parallelize import replicate
from trainer.distributed.world import World, start_world
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.requests import Requests
from trainer.health.deferred_read import DeferredRead
from trainer.health.loss_monitor import scalars_to_read
from trainer.metrics import Meter
from trainer.optim import build_optimizer, set_learning_rates
from trainer.schedule import multiplier
from trainer.step import StepOptions, train_step

LONG, SHORT = 136, 8
SYNCS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive", "allclose"}
HIDDEN_SYNCS = ("tolist", "cpu", "numpy")
"""Tensor methods that copy to the host without an operator that the dispatcher would see."""


class Counter(TorchDispatchMode):
    """Counter of operators and host syncs inside the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_ops = self.num_syncs = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.num_ops += 1
        name = func.overloadpacket.__name__
        indexes = args[1] if name in ("index", "index_put", "index_put_") and len(args) > 1 else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indexes)
        self.num_syncs += name in SYNCS or by_mask
        return func(*args, **(kwargs or {}))


@contextmanager
def hidden_syncs(counter: Counter) -> Iterator[None]:
    """Count host syncs that the dispatcher does not see."""
    originals = {name: getattr(Tensor, name) for name in HIDDEN_SYNCS}

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> Any:
            counter.num_syncs += 1
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(Tensor, name, counted(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def write_demo_model(folder: Path) -> ModelConfig:
    """Write the parts of the demo's model to `folder` and return the settings of a model of them, all tuned, in float32."""
    write_parts(folder, train_tokenizer(CORPUS, VOCAB), VOCAB)
    llm, vision = LlmConfig(str(folder / "llm"), "full"), VisionConfig(str(folder / "vision"), "full")
    return ModelConfig(llm, vision, VisionProjectorConfig(), dtype="float32")


def make_batches(model: MultimodalLM, num: int, size: int) -> list[Batch]:
    """Make deterministic batches of one picture per sample and four supervised tokens."""
    rng = np.random.default_rng(0)
    spec = image_spec(model.specs)
    width = num_tokens(spec, MediaMeta())

    def sample(i: int) -> Sample:
        ids = rng.integers(0, 200, width + 20)
        labels = np.full(len(ids), IGNORE_INDEX)
        labels[-5:-1] = ids[-4:]
        values = torch.from_numpy(rng.standard_normal((1, 3, spec.size, spec.size))).float()
        return Sample(i, 0, ids, labels, {"image": [SampleMedia("image", values, 1, width, np.arange(width), width)]})

    return [collate([sample(i) for i in range(size)], 0) for _ in range(num)]


def our_loop(
    model: MultimodalLM, config: ModelConfig, batches: list[Batch], world: World, wrapped: nn.Module | None = None
) -> Callable[[int], None]:
    """Return a function that does what the training loop does in steps that are not logged. `wrapped`: what is called."""
    optim, wrapped = OptimConfig(lr=1e-4), wrapped or replicate(model, world)
    optimizer, meter = build_optimizer(model, config, optim), Meter(["bench"], world)
    requests, tracker, deferred = Requests(), PhaseTracker(), DeferredRead(world.device)
    ids = [[b.sample_ids.tolist()] for b in batches]  # the loop reads them from batches that are not on the device yet

    def run(steps: int) -> None:
        share: Tensor | float = 0.0  # this rank's part of the previous step's loss, which is summed with the counts and checked
        for step in range(steps):
            set_learning_rates(optimizer, multiplier(optim, step, steps))
            batch = [batches[step % len(batches)].to(world.device)]
            tracker.begin("copy", step, ids[step % len(ids)])
            extra = [*requests.announce(), share]
            options = StepOptions(seed=0, step=step, clip_norm=optim.clip_norm, extra=extra, mark=tracker.mark)
            result = train_step(wrapped, optimizer, batch, world, options)
            deferred.swap(scalars_to_read(result))
            share = result.losses.sum()
            meter.add(batch, result, 0.0)

    return run


def bare_loop(wrapped: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], world: World) -> Callable[[int], None]:
    """Return the shortest loop around a wrapped model, with the library's own clipping and scheduler."""

    def run(steps: int) -> None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
        for step in range(steps):
            term = wrapped(batches[step % len(batches)].to(world.device))["text"]
            (term.sum / term.num_addends).backward()
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)

    return run


class ForTrainer(nn.Module):
    """The same model behind the interface that Hugging Face's Trainer expects."""

    def __init__(self, model: MultimodalLM, batches: list[Batch]) -> None:
        super().__init__()
        self.model, self.batches = model, batches

    def forward(self, labels: Tensor, num_items_in_batch: object = None) -> dict[str, Tensor]:
        term = self.model(self.batches[labels.shape[0] % len(self.batches)])["text"]
        return {"loss": term.sum / term.num_addends}


def hugging_face(model: MultimodalLM, batches: list[Batch], folder: str) -> Callable[[int], None]:
    """Return a run of Trainer with everything optional switched off; its data loader hands over next to nothing."""
    from transformers import Trainer, TrainingArguments

    wrapped = ForTrainer(model, batches)

    def run(steps: int) -> None:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows = [{"labels": torch.zeros(1, dtype=torch.long)} for _ in range(steps)]
        trainer = Trainer(model=wrapped, args=arguments, train_dataset=rows)
        trainer.can_return_loss = True
        trainer.train()

    return run


def per_step(measure: Callable[[Callable[[int], None], int], tuple[float, ...]], run: Callable[[int], None]) -> tuple[float, ...]:
    """Return the cost of one step in a steady state: start-up and teardown are in both runs, so they cancel."""
    long, short = measure(run, LONG), measure(run, SHORT)
    return tuple((a - b) / (LONG - SHORT) for a, b in zip(long, short))


def count_ops(run: Callable[[int], None], steps: int) -> tuple[float, ...]:
    with Counter() as counter, hidden_syncs(counter):
        run(steps)
    return counter.num_syncs, counter.num_ops


def count_calls(run: Callable[[int], None], steps: int) -> tuple[float, ...]:
    calls = 0

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run(steps)
    finally:
        sys.setprofile(None)
    return (float(calls),)


def count_seconds(run: Callable[[int], None], steps: int) -> tuple[float, ...]:
    return (cpu_time(lambda: run(steps)),)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_step", __doc__)
    parser.add_argument("--batch", type=int, default=8, help="samples per step (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of the CPU time (default 5)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = start_world()
    with tempfile.TemporaryDirectory() as folder:
        config = write_demo_model(Path(folder))
        models = [build_model(config) for _ in range(3)]
        batches = make_batches(models[0], 4, arguments.batch)
        runs = {
            "ours": our_loop(models[0], config, batches, world),
            "bare loop": bare_loop(models[1], build_optimizer(models[1], config, OptimConfig(lr=1e-4)), batches, world),
            "Trainer": hugging_face(models[2], batches, f"{folder}/out"),
        }
        report(runs, arguments.rounds)
    return 0


def report(runs: dict[str, Callable[[int], None]], rounds: int) -> None:
    for run in runs.values():
        run(2)
    counts = {name: (*per_step(count_ops, run), *per_step(count_calls, run)) for name, run in runs.items()}
    seconds = in_turns({name: partial(per_step, count_seconds, run) for name, run in runs.items()}, rounds)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread, one process")
    print(f"{'per step':<12}{'host syncs':>12}{'operators':>12}{'Python calls':>14}{'CPU ms (median)':>17}{'calls / bare':>14}")
    for name, (syncs, ops, calls) in counts.items():
        ratio, ms = calls / counts["bare loop"][2], 1e3 * statistics.median(ms for (ms,) in seconds[name])
        print(f"{name:<12}{syncs:>12.2f}{ops:>12.1f}{calls:>14.1f}{ms:>17.2f}{ratio:>14.3f}")


if __name__ == "__main__":
    sys.exit(main())
