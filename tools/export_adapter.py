"""Export a run for others: its trained files, a PEFT folder, a folder for transformers, or the layout of LLaVA, InternVL or VITA.

SOURCE is a final/ folder or any checkpoint-N of a run. OUT must not exist yet, or be empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # started as a file, its own folder is on the path and not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.card import read_card
from model.errors import ConfigError
from tools.cli import run_command
from tools.exports.hf_folder import to_hf
from tools.exports.llava_folder import to_llava
from tools.exports.llm_folder import to_llm
from tools.exports.model_card import write_model_card
from tools.exports.original_internvl import to_internvl
from tools.exports.output_folder import listing, new_folder
from tools.exports.part_files import to_safetensors
from tools.exports.peft_folder import to_peft
from tools.exports.task import Exported, ExportTask
from tools.exports.vita_folder import to_vita

TARGETS: dict[str, Callable[[ExportTask], Exported]] = {
    "safetensors": to_safetensors,
    "llm": to_llm,
    "peft": to_peft,
    "hf": to_hf,
    "llava": to_llava,
    "internvl": to_internvl,
    "vita": to_vita,
}
"""Writers by kind of folder: each fills task.folder and returns what it wrote, with the command to type next."""


def export(source: Path, out: Path, target: str = "safetensors", inside: str = "") -> None:
    """Write `out`, whole or not at all, and print what it holds."""
    if inside and target != "peft":
        raise ConfigError(f"--inside {inside} belongs to --for peft, not to --for {target}")
    card = read_card(source)
    with new_folder(out) as folder:
        task = ExportTask(source, folder, out, card, inside)
        exported = TARGETS[target](task)
        write_model_card(task, exported)
    for note in exported.notes:
        print(note)
    print(f"{out}:\n{listing(out)}\nnext: {exported.following}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="export_adapter", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a final/ folder or a checkpoint-N")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    described = "\n".join(f"{name}: {(write.__doc__ or '').strip().splitlines()[0]}" for name, write in TARGETS.items())
    parser.add_argument("--for", dest="target", choices=TARGETS, default="safetensors", help=described)
    parser.add_argument(
        "--inside", choices=("hf",), default="",
        help="peft: the adapter of the language model inside a whole folder for transformers, written to OUT/base without it",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    return run_command("export_adapter", lambda: export(given.source, given.out, given.target, given.inside))


if __name__ == "__main__":
    raise SystemExit(main())
