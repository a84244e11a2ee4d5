"""Check that what is exported is served as it was trained: prompt ids and greedy answers in transformers, PEFT and vLLM.

For each class a tiny model is made and trained for some steps in DIR, exported merged (--for hf) and as an adapter inside the class
(--for peft --inside hf), and asked by each library. The answers of this project's own model are what is compared with.

    python -m tools.check_serving DIR                                     # libraries of this Python: transformers, PEFT
    python -m tools.check_serving DIR --python other/bin/python --vllm    # those of another one, vLLM included
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from data.processor import load_processor
from model.errors import ConfigError
from model.files.untrusted import Json
from model.generate import until_stop
from model.load import load_model
from tools.cli import command_parser, run_command
from tools.export_adapter import export
from tools.exports import ask_library
from tools.exports.serving_models import CASES, ROOM, questions, write_run
from trainer.errors import ProofError
from trainer.main import run as train
from trainer.runfile.load import load_config
from trainer.runfile.toml_files import to_toml

STEPS, LENGTH, SECONDS = 120, 12, 600
READERS = {"transformers": ("hf", ""), "peft": ("peft/base", "peft"), "vllm": ("hf", ""), "vllm-lora": ("peft/base", "peft")}
"""Folders of each way to read an export: the model, and the adapter on it."""


def make_case(folder: Path, case: str) -> Json:
    """Train and export the model of one class; return the questions, and our own prompt ids and greedy answers."""
    if not (folder / "run" / "final").is_dir():
        run_file = folder / "run.toml"
        tables = write_run(folder, case, STEPS)
        run_file.write_text(to_toml(tables))
        if code := train(load_config(str(run_file))):
            raise ProofError(f"{case}: the tiny run ended with code {code}")
    final = folder / "run" / "final"
    for name, target, inside in (("hf", "hf", ""), ("peft", "peft", "hf"), ("llm_alone", "llm", "")):
        if not (folder / name).is_dir():
            export(final, folder / name, target, inside)
    model, processor = load_model(final, dtype="float32"), load_processor(final)
    asked = questions(folder, case)
    prompts, answers = [], []
    for messages in asked:
        batch = processor([{"messages": messages}])
        prompts.append(batch.input_ids[0].tolist())
        answers.append(model.generate(batch, LENGTH)[0])
    return {"questions": asked, "prompts": prompts, "answers": answers, "stops": list(processor.stop_ids)}


def ask_reader(python: str, folder: Path, case: str, reader: str, expected: Json) -> str:
    """Ask one library and return a line of the report."""
    model, adapter = READERS[reader]
    out = folder / f"{reader}.json"
    out.unlink(missing_ok=True)
    task = {
        "library": "vllm" if reader.startswith("vllm") else "transformers",
        "class": f"{case}ForConditionalGeneration",
        "folder": str((folder / model).absolute()),
        "adapter": str((folder / adapter).absolute()) if adapter else "",
        "questions": expected["questions"],
        "length": LENGTH,
        "room": ROOM,
        "out": str(out.absolute()),
    }
    file = folder / f"{reader}.task.json"
    file.write_text(json.dumps(task))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, ask_library.__file__, str(file.absolute())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode or not out.is_file():
        said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        return f"{case:<16} {reader:<13} failed: {' / '.join(said[-2:])[:300]}"
    return f"{case:<16} {reader:<13} {compared(json.loads(out.read_text()), expected)}"


def compared(found: Json, expected: Json) -> str:
    """Return how many prompts and answers are equal, and the versions of the libraries."""
    whole = [until_stop(answer, expected["stops"]) for answer in expected["answers"]]
    answers = [until_stop(answer, expected["stops"]) for answer in found["answers"]]
    num, prompts = len(whole), sum(a == b for a, b in zip(found["prompts"], expected["prompts"], strict=True))
    equal = sum(a == b for a, b in zip(answers, whole, strict=True))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"prompt ids {prompts}/{num}, greedy answers {equal}/{num}, {len({tuple(a) for a in whole})} different ({versions})"


def check_cases(folder: Path, python: str, cases: list[str], readers: list[str]) -> None:
    """Make each case and ask each reader, one line each. Raises ProofError when one differs or fails."""
    lines = []
    for case in cases:
        expected = make_case(folder / case, case)
        for reader in readers:
            lines.append(ask_reader(python, folder / case, case, reader, expected))
            print(lines[-1], flush=True)
    if wrong := [line for line in lines if "failed" in line or any(f" {n}/{m}" in line for m in (3, 4) for n in range(m))]:
        raise ProofError(f"{len(wrong)} of {len(lines)} differ")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("check_serving", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the tiny models are made; what is there is kept")
    parser.add_argument("--python", default=sys.executable, help="the Python that has the libraries; default: this one")
    parser.add_argument("--vllm", action="store_true", help="ask vLLM too, merged and with the adapter")
    parser.add_argument("--classes", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args(argv)
    if not Path(given.python).exists():
        raise ConfigError(f"--python {given.python}: there is no such file")
    readers = [reader for reader in READERS if given.vllm or not reader.startswith("vllm")]
    return run_command("check_serving", lambda: check_cases(given.folder, given.python, given.classes, readers))


if __name__ == "__main__":
    raise SystemExit(main())
