"""Check every record of every source before any weight is read: what a run could not train on, and what the data hold.

Records are parsed, rendered and counted; media are looked up and their headers and ends read. Results are kept in the run
folder: a check that was stopped resumes, one of unchanged data takes seconds, and a run that starts afterwards plans by exact
lengths. Exit code 65 when a record breaks the rules. Records that are too long, duplicates, and what validation shares with
training are reported and leave it at 0. With --write-clean the records that break no rule are copied, and it is 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from data.check.check_dataset import SourceFound, check_dataset, remove_stale
from data.check.check_record import Depth
from data.check.duplicates import find_duplicates
from data.check.report import field_of, match_row, problem_rows, summarise_source, summary_lines
from data.dataset import MultimodalDataset
from model.errors import ConfigError, DataError
from model.files.untrusted import Json
from tools.clean_copy import check_target, write_clean
from tools.cli import check_named, check_positive, command_parser, printable_lines, run_command
from trainer.checkpoint.retention import checkpoints
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.records.freeze_lengths import available_cpus
from trainer.records.run_data import open_data
from trainer.runfile.load import load_config
from trainer.runfile.stages import Stage, stage_for_reading
from trainer.runfile.toml_files import without_dashes

SHOWN = 20  # problems of each field, and duplicates of each kind
BAD_FILE, DUPLICATES_FILE = "bad.jsonl", "duplicates.jsonl"
MATCHES = {
    "duplicate": "records repeat an earlier one of their split",
    "leak": "records of validation stand in training as well",
    "shared_medium": "media of validation stand in training as well",
    "near_duplicate": "records nearly repeat an earlier one of their split",
    "near_leak": "records of validation stand in training nearly the same",
    "near_shared_medium": "pictures of validation look like one in training",
}


def check(options: argparse.Namespace) -> None:
    check_positive(options, "workers")
    check_named("--out", options.out, is_folder=True)
    if options.write_clean:
        check_target(Path(options.write_clean))
        check_named("--write-clean", options.write_clean, is_folder=True)
    stage = stage_for_reading(load_config(options.cfg, options.overrides), options.stage)
    config = stage.config
    datasets = open_datasets(stage)
    index_folder = Path(config.output_dir) / "index"
    depth = Depth(options.decode, options.near)
    found = {
        split: check_dataset(dataset, index_folder, depth=depth, workers=options.workers, name=f"check {split}")
        for split, dataset in datasets.items()
    }
    if not stage.name:  # other stages keep the results of their data in the same folder
        remove_stale(index_folder, list(datasets.values()))
    out = Path(options.out or stage.folder)
    out.mkdir(parents=True, exist_ok=True)
    counts = report_sources(datasets, found, out)
    matches = report_duplicates(datasets, found, out, options.near)
    print(lengths_note(config))
    if options.write_clean:
        print("\n".join(write_clean(datasets, found, Path(options.write_clean))))
    num_bad = sum(source["bad"] for sources in counts.values() for source in sources.values())
    print(json.dumps({"bad": num_bad, "duplicates": matches, **counts}))
    if num_bad and not options.write_clean:
        count = f"{num_bad} records break" if num_bad > 1 else "1 record breaks"
        raise DataError(f"{count} the rules; all stand in {out / BAD_FILE}")


def open_datasets(stage: Stage) -> dict[str, MultimodalDataset]:
    """Open the datasets of the run or stage, by split; no weight is read."""
    data = open_data(stage.config, World(0, 0, 1, torch.device("cpu")), stage=stage)
    datasets = {"train": data.train, "validation": data.validation}
    present = {split: dataset for split, dataset in datasets.items() if dataset is not None}
    if not present:
        raise ConfigError("data.sources is empty: there is nothing to check")
    return present


def report_sources(datasets: dict[str, MultimodalDataset], found: dict[str, list[SourceFound]], out: Path) -> dict[str, Json]:
    """Print every source and write bad.jsonl; return the summaries by split and source."""
    counts: dict[str, Json] = {}
    rows: list[Iterator[dict[str, object]]] = []
    for split, dataset in datasets.items():
        for source, one in zip(dataset.sources, found[split]):
            counts.setdefault(split, {})[source.key] = summarise_source(one.found)
            rows.append(problem_rows(split, source.key, one.found))
            name = f"{split} {source.key}: {source.path}"
            cached = f" ({one.num_cached} of {one.num_parts} parts cached)" if one.num_cached else ""
            print(f"\n{name}{cached}\n{'=' * len(name)}")
            print("\n".join(summary_lines(counts[split][source.key])))
            for line in first_problems(one):
                print(printable_lines(line))
    write_json_lines(out / BAD_FILE, itertools.chain.from_iterable(rows))
    return counts


def first_problems(one: SourceFound) -> Iterator[str]:
    """Yield the first problems of each field."""
    seen: Counter[tuple[str, str]] = Counter()
    for _, problem in one.found.problems:
        field = (problem.kind, field_of(problem))
        seen[field] += 1
        if seen[field] <= SHOWN:
            yield f"  {problem}"
    for (kind, name), count in seen.items():
        if count > SHOWN:
            yield f"  ... and {count - SHOWN:,} more of {name}" + (", too long" if kind != "bad" else "")


def report_duplicates(
    datasets: dict[str, MultimodalDataset], found: dict[str, list[SourceFound]], out: Path, near: bool
) -> dict[str, int]:
    """Print repeated records and media and write duplicates.jsonl; return how many there are by kind."""
    train, validation = ([one.found for one in found.get(split, [])] for split in ("train", "validation"))
    sources = [(split, s.key, i) for split, dataset in datasets.items() for s, i in zip(dataset.sources, dataset.indexes)]
    matches = find_duplicates(train, validation, near=near)
    counts = Counter(match.kind for match in matches)
    write_json_lines(out / DUPLICATES_FILE, (match_row(match, sources) for match in matches))
    for kind, meaning in MATCHES.items():
        if counts[kind]:
            print(f"\n{counts[kind]:,} {meaning}")
        for match in itertools.islice((match for match in matches if match.kind == kind), SHOWN):
            row = match_row(match, sources)
            place, other = (f"{row[p + 'file']}:{row[p + 'line']} {row[p + 'id']}" for p in ("", "other_"))
            print(printable_lines(f"  {place}: as {other}"))
        if counts[kind] > SHOWN:
            print(f"  ... and {counts[kind] - SHOWN:,} more in {out / DUPLICATES_FILE}")
    return dict(sorted(counts.items()))


def lengths_note(config: RunConfig) -> str:
    if checkpoints(Path(config.output_dir)):
        return f"\nthe run in {config.output_dir} keeps the lengths it was first planned by; a new one plans by the exact ones"
    return "\nlengths are exact now: the run plans by them"


def write_json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object per line; the file appears at once."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)  # ASCII: no id can break a line
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("check_data", __doc__)
    parser.add_argument("--cfg", required=True, help="the run file")
    parser.add_argument("--stage", default="", metavar="NAME", help="of a file with [[stage]] tables: this one")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes (one per processor)")
    parser.add_argument("--out", default="", help=f"folder of {BAD_FILE} and {DUPLICATES_FILE} (the run's)")
    parser.add_argument("--write-clean", default="", metavar="DIR", help="copy every source without its bad records to this folder")
    parser.add_argument("--decode", action="store_true", help="decode all media in full: slow, and finds what headers hide")
    parser.add_argument("--near", action="store_true", help="decode pictures small, to find those that look alike: slow")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    options = parser.parse_intermixed_args(without_dashes(argv))  # options may stand before the last positional
    # Worker processes share the machine; the tokenizer's own threads would compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return run_command("check_data", lambda: check(options))


if __name__ == "__main__":
    raise SystemExit(main())
