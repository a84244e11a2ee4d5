"""A dry run: what a run file would train, at full size on paper and in two small steps; weights and data need not be there."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

from data.text.tokenizer import load_tokenizer, save_tokenizer
from model.card import language_model_config
from model.files.tensor_files import dump_json
from trainer.config import RunConfig
from trainer.distributed.world import World, start_world, stop_world
from trainer.errors import CONFIG, DONE, INTERNAL, code_of
from trainer.metrics import NAME as METRICS
from trainer.run import train
from trainer.runfile.load import load_run
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import list_stages
from trainer.supervise import run_supervised
from trainer.trial.full_size import describe_full_size
from trainer.trial.made_up_tokenizer import make_tokenizer
from trainer.trial.reachable_parts import with_reachable
from trainer.trial.small_run import SAMPLES, STEPS, SmallRun, run_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def dry_run(path: str, overrides: Sequence[str]) -> int:
    """Try a run file and print one screen about it, or what is wrong with it; return the exit code. Collective under torchrun."""
    try:
        return _try_out(path, overrides)
    except Exception as error:
        if (code := code_of(error)) == INTERNAL:
            raise
        print(f"trainer: {error}", file=sys.stderr, flush=True)
        return code


def _try_out(path: str, overrides: Sequence[str]) -> int:
    """Prepare the dry run on rank 0, and run it on all ranks of this machine. Collective.

    Everything is written into a temporary folder that is removed.
    """
    world = start_world()
    try:
        with TemporaryDirectory(prefix="dry-run-") as folder:
            trial, error, tables = Trial(Path(folder), world), None, None
            if world.is_main:
                try:
                    tables = to_tables(trial.prepare(path, overrides))
                except Exception as caught:
                    error = caught
            tables = world.broadcast_json(tables)
            if error is not None:
                raise error
            if tables is None:  # rank 0 tells why
                return CONFIG
            code = trial.run(run_of(tables))
            world.barrier()  # the folder of rank 0 stays until all are done
            return code
    finally:
        if world.size == 1:
            stop_world()


@dataclass
class Trial:
    """One dry run: its folder, its ranks, and when it began."""

    folder: Path
    world: World
    started_at: float = field(default_factory=time.perf_counter)
    places: dict[str, str] = field(default_factory=dict)  # folders in place of parts that cannot be reached, by their paths

    def prepare(self, path: str, overrides: Sequence[str]) -> RunConfig:
        """Print what the run is at full size and what is made up; return the small run. On rank 0."""
        root, aside = load_run(path, overrides, lambda tables: with_reachable(tables, self.folder / "shapes", self.places))
        for line in aside:
            self._say("aside", line)
        for name in self.places:
            where = "which is no folder and not in the cache of the hub: the one of the built-in table"
            self._say("made up", f"shape of {name!r}, {where}")
        tokenizer, root = self._tokenizer(root)
        self._say("at full size", "")
        for line in describe_full_size(root, self.folder / "paper", self.world):
            print(line, flush=True)
        trial = SmallRun(root, self.folder / "small", tokenizer)
        small = trial.make()
        for note in dict.fromkeys(trial.notes):
            self._say("made up", self._original(note))
        return small

    def _tokenizer(self, root: RunConfig) -> tuple[PreTrainedTokenizerFast, RunConfig]:
        """Return the run's tokenizer, or a small one, and the run with a folder that holds it."""
        llm = root.model.llm
        if not Path(llm.path).is_dir() or any((Path(llm.path) / name).is_file() for name in TOKENIZER_FILES):
            return load_tokenizer(llm.path, (), root.model.cache_dir).tokenizer, root
        # Of config.json alone transformers would make a tokenizer without words.
        templates = [stage.config.data.template for stage in list_stages(root)]
        tokenizer = make_tokenizer(templates)
        like = " and ChatML in place of its chat template" if "auto" in templates else ""
        self._say("made up", f"tokenizer of {self._original(llm.path)!r}, which is not there: a small one{like}")
        folder = self.folder / "llm"
        save_tokenizer(tokenizer, folder)
        (folder / "config.json").write_text(dump_json(language_model_config(root.model)))
        model = replace(root.model, llm=replace(llm, path=str(folder), dequantize=False))
        self.places.setdefault(llm.path, str(folder))
        return tokenizer, replace(root, model=model)

    def run(self, config: RunConfig) -> int:
        """Train the small run with all its output kept back, print its losses, and return its exit code. Collective."""
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            code = run_supervised(train, config, self.world)
        if not self.world.is_main:
            return code
        if code != DONE:
            self._say("failed", self._original(said.getvalue().strip().rpartition("trainer: ")[2]))
            return code
        for line in self._losses(Path(config.output_dir) / METRICS):
            self._say("trained", line)
        seconds = time.perf_counter() - self.started_at
        steps = f"{STEPS} steps of {SAMPLES} samples on small parts of the same kinds, nothing kept"
        self._say("passed", f"in {seconds:.0f} s: {steps}")
        return code

    def _losses(self, path: Path) -> Iterator[str]:
        """Yield the losses of the steps, a line per stage."""
        found: dict[str, list[float]] = {}
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if "train/loss" in line:
                found.setdefault(line.get("stage", ""), []).append(line["train/loss"] or math.nan)
        for stage, losses in found.items():
            yield f"{stage + ': ' if stage else ''}loss {', '.join(f'{loss:.4f}' for loss in losses)}"

    def _original(self, text: str) -> str:
        """Return the text with the paths of the run file in place of those of stand-ins."""
        for name, place in self.places.items():
            text = text.replace(place, name)
        return text

    def _say(self, word: str, text: str) -> None:
        print(f"{word:<10}{text}".rstrip(), flush=True)
