"""README.md of an export: a model card as pages of hubs render it, made from what the run itself recorded.

It names data by their names and numbers alone and folders by their last name: a card is read by others.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from model.card import ModelCard
from model.files.untrusted import Json, load_json
from tools.exports.task import Exported, ExportTask
from trainer.machine.json_lines import read_lines

NAME = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WIDTH, HEIGHT = 60, 9
"""Columns and lines of the curve."""
SHOWN = {
    "optim": ("lr", "projector_lr", "schedule", "warmup_ratio", "weight_decay"),
    "batch": ("global_batch_size", "micro_batch_size"),
    "train": ("epochs", "max_steps", "seed"),
    "data": ("template", "max_length", "image_fit", "max_tiles", "image_grid", "anyres_max", "media_wrap", "packing"),
}
"""Settings that a reader asks for first, by table of run.toml; each is shown where it was written or resolved."""


@dataclass(frozen=True)
class Recorded:
    """The records of a run in its folder; each is empty where the folder does not hold it."""

    settings: Json = field(default_factory=dict)  # tables of run.toml
    ledger: list[Json] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    last_validation: float | None = None
    step: int | None = None


def write_model_card(task: ExportTask, exported: Exported) -> None:
    """Write README.md into the export."""
    (task.folder / NAME).write_text(model_card(task, exported), encoding="utf-8")


def model_card(task: ExportTask, exported: Exported) -> str:
    """Return the text of the card."""
    run, card = recorded(task.source), task.card
    sections = [
        front_matter(card, exported),
        f"# {task.out.name}\n\n{exported.what[:1].upper()}{exported.what[1:]}.\n",
        _section("Parts", _parts(card)),
        _section("Data", _data(run)),
        _section("Settings", _settings(card, run)),
        _section("Loss", _curve(run)),
        _section("To know", "\n".join(f"- {note}" for note in exported.notes)),
        _section("Use", f"```sh\n{exported.following.replace(str(task.out), task.out.name)}\n```"),
        _section("Licence", "Left for the owner to choose: name it here and as `license` at the top of this file."),
    ]
    return "\n".join(section for section in sections if section)


def front_matter(card: ModelCard, exported: Exported) -> str:
    """Return the YAML block that a hub reads. Only names of a hub stand in it, never folders of a machine."""
    bases = [path for path in base_paths(card).values() if on_hub(path)]
    lines = ["---", "# license: left for the owner, such as apache-2.0 or other"]
    lines += [f"library_name: {exported.library}"] if exported.library else []
    lines += [f"pipeline_tag: {exported.task}"] if exported.task else []
    if bases:
        relation = "adapter" if exported.library == "peft" else "finetune"
        lines += ["base_model:", *(f"- {base}" for base in bases), f"base_model_relation: {relation}"]
    return "\n".join([*lines, "tags:", "- multimodal", "---", ""])


def base_paths(card: ModelCard) -> dict[str, str]:
    """Return the base of each part that has one."""
    return {name: getattr(card.model, name).path for name in ("llm", "vision", "audio") if getattr(card.model, name) is not None}


def on_hub(path: str) -> bool:
    """Tell whether a path names a repository of a hub, and no folder of this machine."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def shown_path(path: str) -> str:
    """Return a hub's name, or the last name of a folder."""
    return path if on_hub(path) else Path(path).name


def recorded(source: Path) -> Recorded:
    """Read what the run of a final/ folder or checkpoint recorded; a record that is missing or damaged is left out."""
    folder, step = run_folder(source), _step(source)
    metrics = [line for line in _lines(folder / "metrics.jsonl") if step is None or line["step"] <= step]
    losses = [(line["step"], line["train/loss"]) for line in metrics if _is_number(line.get("train/loss"))]
    validation = [line["val/loss"] for line in metrics if _is_number(line.get("val/loss"))]
    ledger = _json(next((file for file in (source.parent / "ledger.json", folder / "ledger.json") if file.is_file()), folder))
    rows = ledger.get("sources", [])
    return Recorded(_toml(folder / "run.toml"), rows if isinstance(rows, list) else [], losses, (validation or [None])[-1], step)


def run_folder(source: Path) -> Path:
    """Return the folder of the run that wrote `source`: the nearest above it with a run.toml, else its own."""
    return next((folder for folder in source.absolute().parents if (folder / "run.toml").is_file()), source)


def _step(source: Path) -> int | None:
    step = _json(source / "provenance.json").get("step", _json(source / "manifest.json").get("step"))
    return step if isinstance(step, int) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _json(file: Path) -> Json:
    try:
        value = load_json(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _toml(file: Path) -> Json:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _lines(file: Path) -> list[Json]:
    try:
        return read_lines(file, {"step": int})[0]
    except OSError:
        return []


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}\n" if text else ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parts(card: ModelCard) -> str:
    bases, rows = base_paths(card), []
    for name, part in card.model.parts().items():
        base = shown_path(bases[name]) if name in bases else str(getattr(part, "kind", ""))
        rows.append((name, base, part.tune))
    return _table(("part", "base or kind", "trained"), rows)


def _data(run: Recorded) -> str:
    if run.ledger:
        rows: list[tuple[object, ...]] = [(row.get("source"), row.get("size"), row.get("trained")) for row in run.ledger]
        return _table(("source", "records", "trained at least once"), rows)
    named = run.settings.get("data", {}).get("sources", [])
    names = [str(source.get("name") or Path(str(source.get("path", ""))).stem) for source in named if isinstance(source, dict)]
    return "\n".join(f"- {name}" for name in names) or "Not recorded beside the exported folder."


def _settings(card: ModelCard, run: Recorded) -> str:
    rows: list[tuple[object, ...]] = [("step", run.step)] if run.step is not None else []
    rows.append(("dtype", card.model.dtype))
    if card.lora_parts:
        rows += [(f"lora.{key}", getattr(card.lora, key)) for key in ("rank", "alpha", "dropout", "rslora", "bias")]
    if card.quantize.bits != 16:
        rows.append(("quantize.bits", card.quantize.bits))
    for table, keys in SHOWN.items():
        values = run.settings.get(table, {})
        rows += [(f"{table}.{key}", values[key]) for key in keys if values.get(key) not in (None, "", [], 0)]
    rows += [("torch", torch.__version__), ("transformers", transformers.__version__)]
    return _table(("setting", "value"), rows)


def _curve(run: Recorded) -> str:
    if len(run.losses) < 2:
        return ""
    (first, begun), (last, ended) = run.losses[0], run.losses[-1]
    said = f"Training loss {begun:.4g} at step {first}, {ended:.4g} at step {last}"
    said += f"; validation {run.last_validation:.4g} at the end." if run.last_validation is not None else "."
    return f"{said}\n\n```text\n{draw_curve(run.losses)}\n```"


def draw_curve(points: list[tuple[int, float]], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Draw a curve as text: each column is the mean of its share of the points, which are in the order of their steps."""
    width = min(width, len(points))
    shares = [points[i * len(points) // width : (i + 1) * len(points) // width] for i in range(width)]
    values = [sum(value for _, value in share) / len(share) for share in shares]
    low, high = min(values), max(values)
    place = [round((value - low) / (high - low) * (height - 1)) if high > low else 0 for value in values]
    lines = []
    for level in reversed(range(height)):
        label = low + (high - low) * level / (height - 1)
        lines.append(f"{label:>9.4g} |" + "".join("*" if at == level else " " for at in place).rstrip())
    return "\n".join(
        [
            *lines,
            " " * 10 + "+" + "-" * width,
            f"{'step':>9}  {points[0][0]}{points[-1][0]:>{max(1, width - len(str(points[0][0])))}}",
        ]
    )
