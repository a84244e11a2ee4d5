"""The files of the parts that a run trained, and the settings with which a run goes on from them."""

from __future__ import annotations

import shlex
from pathlib import Path

from model.card import ModelCard
from model.errors import ConfigError
from model.exports.llm_folder import inherited_parts
from model.exports.trained_files import PROJECTORS, changed_parts, trained_files, write_file
from model.files.tensor_files import dump_json
from model.files.untrusted import Json
from model.weights.peft_adapter import INHERITS, OUR_CONFIG, OURS
from tools.exports.model_card import run_folder
from tools.exports.task import Exported, ExportTask


def to_safetensors(task: ExportTask) -> Exported:
    """Write one file per part that was trained beside the language model's own weights."""
    source, card = task.source, task.card
    files = trained_files(source, card)
    if not files:
        raise ConfigError(
            f"{source} trained nothing beside the language model's own weights: --for llm writes it as a folder for transformers"
        )
    for name, tensors in files.items():
        write_file(task.folder / name, tensors)
    inherits = OURS in files and bool(inherited_parts(source, card) & card.lora_parts)
    if OURS in files:
        settings: Json = {key: getattr(card.lora, key) for key in ("rank", "alpha", "rslora", "bias")}
        (task.folder / OUR_CONFIG).write_text(dump_json({**settings, INHERITS: inherits}))
    notes = []
    if card.model.llm.tune == "full":
        notes.append("not exported: llm (tune = 'full'), which is the language model itself; --for llm or --for hf writes it")
    settings_line, alone = to_go_on(task, set(files), inherits)
    following = f"python -m trainer.main --cfg {run_file_of(source)} {settings_line}"
    return Exported(following, "the parts that this run trained, for the trainer that wrote them", notes=(*notes, *alone))


def run_file_of(source: Path) -> str:
    """Return, for a command line, the run file behind `source` and a folder of its own for what goes on from there.

    The run's own folder is complete: a start on it would find nothing left to do.
    """
    folder = run_folder(source)
    if not (folder / "run.toml").is_file():
        return "run.toml"
    return f"{shlex.quote(str(folder / 'run.toml'))} output_dir={shlex.quote(f'{folder}-next')}"


def to_go_on(task: ExportTask, files: set[str], inherits: bool) -> tuple[str, list[str]]:
    """Return settings, beside those of the run's own file, with which a run starts from everything that it has learned.

    The settings name the exported `files`, if each file has a setting and no weight comes from elsewhere; else the run that made
    them, and the second value says why.
    """
    source, card = task.source, task.card
    keys = {**{f"{part}.safetensors": key for part, key in part_keys(card).items()}, OURS: "lora.path"}
    # A language model that was trained whole is not read: the run names it in any case.
    if files <= keys.keys() and not inherits and card.model.llm.tune != "full":
        covered = {file.removesuffix(".safetensors") for file in files} | (card.lora_parts if OURS in files else set())
        if changed_parts(source, card) <= covered:
            return " ".join(f"{key}={task.quoted()}" for file, key in keys.items() if file in files) + " model.init_from=", []
    alone = sorted(files - keys.keys()) + ([OURS] if inherits else [])
    said = [f"no setting reads {', '.join(alone)} alone: to go on with all that was trained, the run itself is named"]
    return from_the_run(source, card), said if alone else []


def part_keys(card: ModelCard) -> dict[str, str]:
    """Return the setting that reads the file of each part beside the language model: with a base, what was learned on top of it."""
    with_base = {part: f"model.{part}.weights" for part in ("vision", "audio")}
    alone = {part: f"model.{part}.path" for part in (*PROJECTORS, "state_head")}
    return {part: key for part, key in (with_base | alone).items() if part in card.model.parts()}


def from_the_run(source: Path, card: ModelCard) -> str:
    """Return settings that start from the run itself, and take back what its own file names."""
    parts = {key: getattr(card.model.parts()[part], key.rpartition(".")[2]) for part, key in part_keys(card).items()}
    named = {"lora.path": card.lora.path, **parts}
    return " ".join([f"model.init_from={shlex.quote(str(source))}", *(f"{key}=" for key, path in named.items() if path)])
