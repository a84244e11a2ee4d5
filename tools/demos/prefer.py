"""Show preference tuning on real pictures: labels of which a tenth are wrong, then right answers preferred to wrong ones.

Run by `make demo-prefer` or `python -m tools.demos.prefer DIR`: needs no network and no GPU, and a few minutes on two CPU cores.
Fails (exit code 70) unless preferences raise the accuracy on held-out pictures by the margin that is printed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from model.files.untrusted import Json
from tools.demo import clear_demo_folder, demo_command, module, run_step, score, trained_by
from tools.demos.run_files import write_run_file
from trainer.errors import ProofError

WRONG, MARGIN = 10, 0.03
"""One label of so many is wrong; accuracy that preferences have to add."""
SEED = 1


def write_preferences(folder: Path) -> None:
    """Write noisy_train.json, whose labels are wrong now and then, and pairs_train.json and pairs_test.json."""
    rng = np.random.default_rng(SEED)
    for split in ("train", "test"):
        records: list[Json] = json.loads((folder / f"digit_{split}.json").read_text(encoding="utf-8"))
        pairs = []
        for i, record in enumerate(records):
            asked, said = record["conversations"]
            wrong = str((int(said["value"]) + int(rng.integers(1, 10))) % 10)
            pair = {"id": f"pair-{record['id']}", "image": record["image"], "conversations": [asked]}
            pairs.append({**pair, "chosen": said["value"], "rejected": wrong})
            if i % WRONG == 0:
                said["value"] = wrong
        write_answers(folder / f"pairs_{split}.json", pairs)
        if split == "train":
            write_answers(folder / "noisy_train.json", records)


def write_answers(path: Path, records: list[Json]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def preferred(folder: Path, final: Path) -> float:
    """Return the share of held-out pairs whose right answer is the more probable one."""
    arguments = ("--data", folder / "pairs_test.json", "--media-root", folder / "images", "--preferences")
    title = "How often is the right answer the more probable one?"
    found = json.loads(run_step(title, module("tools.evaluate", final, *arguments), capture=True).splitlines()[-1])
    print(f"   in {found['preference_accuracy']:.1%} of {found['samples']} pairs", flush=True)
    return float(found["preference_accuracy"])


def demo_preferences(folder: Path, ranks: int) -> None:
    """Write everything, train both stages, and compare the accuracy at the end of each."""
    started = time.monotonic()
    clear_demo_folder(folder)
    run_step("Write pictures, questions and untrained parts", module("tools.make_demo", folder))
    write_preferences(folder)
    write_run_file(folder, "prefer")
    shown = folder / "pairs.html"
    run_step(
        "Look at pairs as the model will see them",
        module("tools.inspect_data", "--cfg", folder / "prefer.toml", "--stage", "prefer", "--html", shown, "--num", "12"),
    )
    run_step(f"Train both stages, on {ranks} processes (FSDP2)", trained_by(ranks, folder / "prefer.toml"))
    finals = {"labels": folder / "run" / "stages" / "01-labels" / "final", "preferences": folder / "run" / "final"}
    exact = {name: score(folder, final, "digit", f"After {name}") for name, final in finals.items()}
    pairs = {name: preferred(folder, final) for name, final in finals.items()}
    run_step("Draw the curves", module("tools.plot_run", folder / "run"))
    gained = exact["preferences"] - exact["labels"]
    print(f"\n{'after':<14}{'exactly right':>14}{'pairs right':>13}")
    print("\n".join(f"{name:<14}{exact[name]:>14.1%}{pairs[name]:>13.1%}" for name in finals))
    print(f"\npreferences add {gained:.1%}, {MARGIN:.0%} is wanted; in {folder}, after {time.monotonic() - started:.0f} seconds:")
    print(f"  {'trained model':<16}run/final\n  {'pairs':<16}{shown.name}\n  {'curves':<16}run/curves.png", flush=True)
    if gained < MARGIN:
        raise ProofError(f"preferences added {gained:.3f}, {MARGIN} was wanted")


def main(argv: list[str] | None = None) -> int:
    return demo_command("demos.prefer", __doc__, demo_preferences, argv, Path("runs/prefer"))


if __name__ == "__main__":
    raise SystemExit(main())
