"""Train one model to read, see, watch and hear, in five stages, and measure the accuracy of each sense before and after each stage.

Needs no network and no GPU: minutes on two CPU cores. Fails (exit code 70) if a stage does not teach what it is there for, or
takes too much from what was known before.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from model.files.untrusted import Json
from tools.demo import clear_demo_folder, demo_command, module, run_step, trained_by
from tools.make_omni import KINDS, WHICH
from tools.plot_run import empty_figure
from trainer.config import TrainConfig, ValidationConfig
from trainer.errors import ProofError
from trainer.runfile.load import load_config
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage, list_stages
from trainer.runfile.toml_files import to_toml

TEACHES = {"text": "text", "align_vision": "image", "vision": "video", "align_audio": "audio", "together": "noise"}
"""The kind of record that each stage of the run file teaches."""
READERS = {"image": "vision", "video": "vision", "audio": "audio", "noise": "audio"}
"""Part of the model that is needed to read each kind of record."""
RISE, LEAST, LOST = 0.2, 0.8, 0.05
"""Least rise of the kind that a stage teaches; least accuracy at the end; most that pictures may lose when audio is added."""

Accuracy = dict[str, float]
"""Exact match on held-out records, by kind."""


def known(stage: Stage) -> list[str]:
    """Return the kinds of records that a model of this stage can read."""
    return [kind for kind in KINDS if kind not in READERS or READERS[kind] in stage.config.model.parts()]


def untrained(folder: Path, stage: Stage) -> Path:
    """Return the model that a stage begins with: the parts that earlier stages trained, and its new parts untrained."""
    out = folder / "before" / stage.name
    nothing = {"train": TrainConfig(max_steps=0), "validation": ValidationConfig()}
    config = replace(stage.config, output_dir=str(out), **nothing)  # type: ignore[arg-type]
    out.mkdir(parents=True)
    file = out.with_suffix(".toml")
    file.write_text(to_toml(to_tables(config)), encoding="utf-8")
    run_step(f"Put together what stage {stage.name!r} begins with", module("trainer.main", "--cfg", file))
    return out / "final"


def accuracy(folder: Path, final: Path, kinds: list[str], when: str) -> Accuracy:
    """Run tools.evaluate and return its results by kind."""
    tests = {kind: json.loads((folder / f"{kind}_test.json").read_text()) for kind in kinds}
    kind_of = {record["id"]: kind for kind, records in tests.items() for record in records}
    records, answers = folder / f"test_{len(kinds)}.json", folder / "answers.jsonl"
    records.write_text(json.dumps([record for found in tests.values() for record in found], indent=1) + "\n")
    arguments = ("--data", records, "--media-root", folder / "media", "--max-new-tokens", "4", "--batch-size", "64")
    run_step(f"{when}: what does it answer?", module("tools.evaluate", final, *arguments, "--predictions", answers), capture=True)
    right = dict.fromkeys(kinds, 0)
    for line in map(json.loads, answers.read_text().splitlines()):
        right[kind_of[line["id"]]] += line["generated"] == line["expected"]
    found = {kind: right[kind] / len(tests[kind]) for kind in kinds}
    print("   " + ", ".join(f"{kind} {value:.1%}" for kind, value in found.items()), flush=True)
    return found


def measure(folder: Path, stages: list[Stage]) -> list[Accuracy]:
    """Measure the accuracy at the start and after each stage, each time of all kinds that the next stage's model can read."""
    found = []
    for before, after in zip([None, *stages], [*stages, None]):
        if after is not None and (before is None or known(before) != known(after)):
            found.append(accuracy(folder, untrained(folder, after), known(after), f"Before stage {after.name!r}"))
        elif before is not None:
            found.append(accuracy(folder, before.folder / "final", known(before), f"After stage {before.name!r}"))
    return found


def shortfalls(names: list[str], found: list[Accuracy]) -> list[str]:
    """List the demands that were not met; `found` has one entry more than stages, that of the start."""
    lines = []
    for number, name in enumerate(names):
        kind = TEACHES[name]
        if (rise := found[number + 1][kind] - found[number][kind]) < RISE:
            lines.append(f"stage {name} raised {kind} by {rise:.3f}, {RISE} was wanted")
    lines += [f"{kind} ends at {value:.3f}, {LEAST} was wanted" for kind, value in found[-1].items() if value < LEAST]
    before_audio = next(values for values in found if "audio" in values)  # measured before the audio parts are trained
    if (lost := before_audio["image"] - found[-1]["image"]) > LOST:
        lines.append(f"images lost {lost:.3f} when audio was added, {LOST} at most was wanted")
    return lines


def accuracy_table(names: list[str], found: list[Accuracy]) -> str:
    """Format the accuracies: kinds down, stages across; a star where a stage teaches the kind."""
    lines = ["\n" + f"{'exact match':<12}" + "".join(f"{name:>14}" for name in ("start", *names))]
    for kind in KINDS:
        cells = [f"{values[kind]:.1%}" if kind in values else "" for values in found]
        cells = [cell + ("*" if i and TEACHES[names[i - 1]] == kind else " ") for i, cell in enumerate(cells)]
        lines.append(f"{kind:<12}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, "* what the stage is there for; empty: the model has no part that could read it"])


def draw(out: Path, names: list[str], found: list[Accuracy]) -> None:
    """Draw one curve per kind over the stages, as a PNG."""
    figure = empty_figure(8, 4.2)
    axes = figure.subplots()
    for kind in KINDS:
        steps = [i for i, values in enumerate(found) if kind in values]
        axes.plot(steps, [found[i][kind] for i in steps], "o-", label=kind)
    axes.axhline(LEAST, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(found)), ["start", *names])
    axes.set(title="held-out accuracy after each stage", ylim=(-0.03, 1.03), ylabel="exact match")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(out, format="png")


def melody_command(folder: Path) -> list[str]:
    """Return the command that plays one held-out melody to the trained model."""
    record: Json = json.loads((folder / "audio_test.json").read_text())[7]
    return module("tools.chat", folder / "run" / "final", "--audio", folder / "media" / record["audio"], WHICH)


def demo(folder: Path, ranks: int) -> None:
    started = time.monotonic()
    clear_demo_folder(folder)
    run_step("Write records, media, untrained parts and the run file", module("tools.make_omni", folder))
    stages = list_stages(load_config(str(folder / "omni.toml")))
    names = [stage.name for stage in stages]
    run_step(f"Train {len(stages)} stages, on {ranks} processes", trained_by(ranks, folder / "omni.toml"))
    trained = time.monotonic()
    found = measure(folder, stages)
    (folder / "accuracy.json").write_text(json.dumps(dict(zip(("start", *names), found)), indent=1) + "\n")
    draw(folder / "omni.png", names, found)
    run_step("Play it one melody; right would be '7'", melody_command(folder))
    print(accuracy_table(names, found))
    seconds = time.monotonic() - started
    print(f"\nin {folder}, after {seconds:.0f} seconds, {trained - started:.0f} of them to train: omni.toml, omni.png, run/final")
    if low := shortfalls(names, found):
        raise ProofError("; ".join(low))


def main(argv: list[str] | None = None) -> int:
    return demo_command("demo_omni", __doc__, demo, argv, Path("runs/omni"))


if __name__ == "__main__":
    raise SystemExit(main())
