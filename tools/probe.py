"""Does the model use what it is given? Losses of held-out answers with their own media, another record's, and blank ones.

Media of one kind are changed at a time, all else stays. Records are those of [[data.validation]]; without it, --records of the
training data. --page writes a page for a browser with the pictures and the tokens of them that the answers depend on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import ConfigError, DataError
from tools.cli import check_named, check_positive, command_parser, printable_lines, run_command, write_named

if TYPE_CHECKING:
    from model.multimodal import MultimodalLM
    from tools.asking.media_use import MediaUse, RecordLosses
    from tools.inspector.choose import Opened

RECORDS = 200


def folder_of(opened: Opened, name: str) -> Path:
    """Return the folder of the weights: `name`, or final/ of the stage, or else its newest checkpoint."""
    from trainer.checkpoint.retention import checkpoints

    place = opened.place
    if name:
        found = place.run_folder / name
        if not found.is_dir():
            raise ConfigError(f"--at {name!r}: {found} is no folder")
        return found
    for found in (place.folder / "final", *reversed(checkpoints(place.run_folder))):
        if found.is_dir():
            return found
    raise ConfigError(f"{place.run_folder} holds neither final/ nor a checkpoint: there is no model to ask yet")


def chosen_ids(opened: Opened, num: int) -> tuple[str, list[int]]:
    """Return the table of run.toml whose records are asked, and the ids of up to `num` per source, spread over it, with media."""
    import numpy as np

    table = "validation" if "validation" in opened.datasets else "sources"
    dataset = opened.datasets[table]
    found: list[int] = []
    for pool in opened.pools[table]:
        ids = pool.ids[dataset.modalities[pool.ids] > 0]
        found += np.unique(ids[np.arange(min(num, len(ids))) * len(ids) // max(min(num, len(ids)), 1)]).tolist()
    if not found:
        raise DataError(f"no record of data.{table} has a picture, a video or a sound: there is nothing to take away")
    return table, found


def words_of(table: str, num: int, num_left_out: int) -> str:
    """Say which records were measured."""
    kind = "held-out records (data.validation)" if table == "validation" else "TRAINING records: the run has no data.validation"
    return f"{num} {kind}" + (f"; {num_left_out} could not be used" if num_left_out else "")


def result_text(uses: list[MediaUse], words: str) -> str:
    """Return all that is printed."""
    from tools.asking.media_use import NAMES

    lines = [words]
    for use in uses:
        other = f"another's {use.other.mean:+.4f} [{use.other.low:.4f}, {use.other.high:.4f}]" if use.other else "no other's"
        empty = f"blank {use.blank.mean:+.4f} [{use.blank.low:.4f}, {use.blank.high:.4f}]"
        better = f", own better in {use.share:.0%}" if use.other else ""
        lines.append(
            f"  {NAMES[use.kind]:<9} {use.source or 'all'}: {use.own.num} records, own {use.own}, {other}, {empty}{better}"
        )
    return printable_lines("\n".join([*lines, *(use.verdict for use in uses if not use.source)]))


def save_page(options: argparse.Namespace, opened: Opened, net: MultimodalLM, found: ProbeResult) -> None:
    """Write the page, with the first --heat records of each source."""
    from data.sample import Sample
    from model.media_spec import ImageSpec
    from tools.asking.heat import heat_of
    from tools.asking.probe_page import Heated, probe_page
    from tools.inspector.entry import entry_of

    dataset = opened.datasets[found.table]
    by_sample: dict[int, list[RecordLosses]] = {}
    for item in found.losses:
        by_sample.setdefault(item.sample, []).append(item)
    taken: dict[str, int] = {}
    shown: list[Heated] = []
    for i, losses in by_sample.items():
        source, sample = losses[0].source, dataset[i]
        taken[source] = taken.get(source, 0) + 1
        if taken[source] <= options.heat and isinstance(sample, Sample):
            shown.append((entry_of(dataset, i, {}), source, losses, heat_of(net, sample, dataset.template.tokenizer)))
    specs = {modality: spec for modality, spec in dataset.specs.items() if isinstance(spec, ImageSpec)}
    text = probe_page(str(options.run), found.words, found.uses, shown, specs, dataset.config.max_length)
    write_named("--page", options.page, text)
    print(f"{options.page}: {len(text) / 2**20:.1f} MiB, {len(shown)} records: open it in a browser")


class ProbeResult:
    """Losses of the probed records, and what they say of each kind of medium."""

    def __init__(self, table: str, words: str, losses: list[RecordLosses]) -> None:
        from tools.asking.media_use import summarise

        self.table, self.words, self.losses, self.uses = table, words, losses, summarise(losses)


def probe(options: argparse.Namespace) -> None:
    check_positive(options, "records", "batch_size", "heat")
    check_named("--page", options.page)
    check_named("--json", options.json)
    if not (options.run / "run.toml").is_file():
        raise ConfigError(f"{options.run} is no folder of a run: it has no run.toml")
    from model.deferred_imports import import_transformers

    import_transformers()
    from tqdm import tqdm

    from tools.asking.media_swap import Donors
    from tools.asking.media_use import Probe
    from tools.inspector.choose import open_sources, stage_to_inspect
    from tools.model_options import load

    opened = open_sources(stage_to_inspect(None, str(options.run), [], options.stage))
    table, ids = chosen_ids(opened, options.records)
    options.final = str(folder_of(opened, options.at))
    dataset, net = opened.datasets[table], load(options)
    measure = Probe(net, dataset, Donors(dataset, ids, opened.config.seed), options.batch_size)
    losses = []
    with tqdm(total=len(ids), unit="record", desc="probe", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(ids), options.batch_size):
            losses += list(measure.measure(ids[start : start + options.batch_size]))
            bar.update(min(options.batch_size, len(ids) - start))
    if not losses:
        raise DataError(f"none of {len(ids)} records of data.{table} can be used: tools.inspect_data --run {options.run} shows why")
    found = ProbeResult(table, words_of(table, len({item.sample for item in losses}), measure.num_left_out), losses)
    print(result_text(found.uses, f"{options.final}: {found.words}"))
    if options.json:
        write_named(
            "--json",
            options.json,
            json.dumps({"records": found.words, "losses": [asdict(item) for item in losses]}, indent=1) + "\n",
        )
    if options.page:
        save_page(options, opened, net, found)


def main(argv: list[str] | None = None) -> int:
    from tools.model_options import add_place_options

    parser = command_parser("probe", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("--at", default="", metavar="FOLDER", help="checkpoint-N in it; default: final, or the newest checkpoint")
    parser.add_argument("--stage", default="", metavar="NAME", help="of a run with [[stage]] tables: this one")
    parser.add_argument("--records", type=int, default=RECORDS, help=f"most records of each source ({RECORDS})")
    parser.add_argument("--batch-size", type=int, default=8, help="records at once (8)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write a page for a browser, with the heat on the pictures")
    parser.add_argument("--heat", type=int, default=12, metavar="K", help="records of each source on the page (12)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the losses of every record")
    add_place_options(parser)
    options = parser.parse_args(argv)
    return run_command("probe", lambda: probe(options))


if __name__ == "__main__":
    raise SystemExit(main())
