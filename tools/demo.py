"""Run the whole path once, on real pictures: data, two trainings, accuracy before and after each, exports, curves, an answer.

Needs no network and no GPU: a few minutes on two CPU cores. Fails (exit code 70) if the accuracy on held-out pictures is too low.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.errors import ConfigError
from tools.cli import command_parser, run_command
from tools.demos.run_files import QUESTIONS
from trainer.errors import ProofError

MARK = ".demo"  # file that marks a folder as the demo's own, which may be replaced
WANTED = {"digit": 0.85, "parity": 0.90}
"""Exact match on held-out pictures that each run must reach."""


@dataclass(frozen=True)
class Score:
    task: str
    before: float
    after: float


class StepError(Exception):
    """A command of the demo failed; it has printed the reason itself."""

    def __init__(self, title: str, exit_code: int) -> None:
        super().__init__(f"{title!r} failed with exit code {exit_code}; what it said itself stands above")
        self.exit_code = exit_code


def module(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def trained_by(ranks: int, config: Path) -> list[str]:
    launch = ("--standalone", f"--nproc_per_node={ranks}", "-m", "trainer.main")
    return module("torch.distributed.run", *launch, "--cfg", config)


def run_step(title: str, command: list[str], capture: bool = False) -> str:
    """Print the title and the command, then run it. Raises StepError if it fails.

    Returns the command's stdout if `capture`, else "".
    """
    print(f"\n== {title}\n   $ {shlex.join(['python', *command[1:]])}", flush=True)
    done = subprocess.run(command, env=own_environment(), text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        raise StepError(title, done.returncode)
    return done.stdout or ""


def own_environment() -> dict[str, str]:
    """Return the environment of a command: it finds these packages, and not others of their names in the current folder."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": threads}


def score(folder: Path, final: Path, task: str, when: str) -> float:
    """Return the share of the held-out pictures that a model answers exactly right."""
    title = f"{when}: what does it answer to {QUESTIONS[task]!r} on pictures it has not seen?"
    arguments = ("--data", folder / f"{task}_test.json", "--media-root", folder / "images", "--max-new-tokens", "16")
    result = json.loads(run_step(title, module("tools.evaluate", final, *arguments), capture=True).splitlines()[-1])
    print(f"   {result['exact_match']:.1%} of {result['samples']} exactly right, loss {result['loss']:.3f}")
    return result["exact_match"]


def train(folder: Path, task: str, ranks: int, before: float, title: str) -> Score:
    run_step(title, trained_by(ranks, folder / f"{task}.toml"))
    return Score(task, before, score(folder, folder / task / "final", task, "After"))


def hand_over(folder: Path) -> None:
    """Use the trained model: export files for others, draw curves, ask a question."""
    final = folder / "parity" / "final"
    run_step("Take out what was trained: projector and adapter", module("tools.export_adapter", final, folder / "export"))
    for task in QUESTIONS:
        run_step(f"Draw the curves of {task}", module("tools.plot_run", folder / task))
    record = json.loads((folder / "parity_test.json").read_text())[0]
    picture = folder / "images" / record["image"]
    command = module("tools.chat", final, "--image", picture, QUESTIONS["parity"])
    run_step(f"Ask about one picture; right would be {record['conversations'][1]['value']!r}", command)


def demo_summary(folder: Path, scores: list[Score], seconds: float) -> str:
    lines = [f"\n{'question':<30}{'before':>8}{'after':>8}{'wanted':>8}"]
    lines += [f"{QUESTIONS[s.task]:<30}{s.before:>8.1%}{s.after:>8.1%}{WANTED[s.task]:>8.0%}" for s in scores]
    places = {
        "trained models": "digit/final, parity/final",
        "projector, adapter": "export",
        "curves": "digit/curves.png, parity/curves.png",
        "run files": "digit.toml, parity.toml: start your own from one of these",
    }
    lines += [f"\nin {folder}, after {seconds:.0f} seconds:", *(f"  {what:<20}{where}" for what, where in places.items())]
    return "\n".join(lines)


def demo(folder: Path, ranks: int) -> None:
    started = time.monotonic()
    clear_demo_folder(folder)
    run_step("Write pictures, questions, untrained parts and run files", module("tools.make_demo", folder))
    untrained = folder / "untrained"
    nothing = ("train.max_steps=0", f"output_dir={untrained}")
    run_step("Put the parts together without training", module("trainer.main", "--cfg", folder / "digit.toml", *nothing))
    before = score(folder, untrained / "final", "digit", "Before")
    first = train(folder, "digit", ranks, before, f"Train everything, on {ranks} processes (FSDP2)")
    before = score(folder, folder / "digit" / "final", "parity", "Before")
    second = train(
        folder, "parity", ranks, before, f"Train an adapter and the projector for another question, on {ranks} processes (DDP)"
    )
    hand_over(folder)
    print(demo_summary(folder, [first, second], time.monotonic() - started))
    if low := [s for s in (first, second) if s.after < WANTED[s.task]]:
        raise ProofError(", ".join(f"{s.task} reached {s.after:.3f}, {WANTED[s.task]} was wanted" for s in low))


def clear_demo_folder(folder: Path) -> None:
    """Remove an earlier demo, because its runs would resume where they stopped.

    Raises ConfigError for a folder that is not the demo's.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise ConfigError(f"{folder} holds something else than a demo: name a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("tools.demo replaces this folder when it runs again\n")


def demo_command(name: str, text: str | None, run: Callable[[Path, int], None], argv: list[str] | None, folder: Path) -> int:
    """Run a demo, `folder` where the command line names none, and return its exit code. `text` describes it."""
    parser = command_parser(name, text)
    parser.add_argument("folder", nargs="?", type=Path, default=folder, metavar="DIR", help=f"default: {folder}")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train together (2)")
    options = parser.parse_args(argv)
    return run_command(name, lambda: run(options.folder, options.ranks))


def main(argv: list[str] | None = None) -> int:
    return demo_command("demo", __doc__, demo, argv, Path("runs/demo"))


if __name__ == "__main__":
    raise SystemExit(main())
