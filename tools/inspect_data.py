"""What the model will see: the first samples of every source as they reach it, with what is learned marked.

Supervised tokens are green, or stand in {+ +} where there is no terminal or NO_COLOR is set. A medium is shown by the tokens it
takes and its file. Indexes are written where the run itself will look for them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from dataclasses import replace

import torch

from data.certificate import certify
from data.config import DataError
from data.dataset import MultimodalDataset, Rejected
from data.index import RecordIndex
from data.record import MediaRef, parse
from data.sample import Sample
from data.template import Template
from model.batch import IGNORE_INDEX
from model.config import ConfigError
from tools.cli import printable, run
from trainer.config import RunConfig
from trainer.distributed import World
from trainer.runfile import load_config
from trainer.sources import open_data

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def open_sources(config: RunConfig) -> tuple[Template, dict[str, MultimodalDataset]]:
    """The template and the datasets of the run, by the table that names them; nothing is certified and no weight is read."""
    # Bad records are shown as such, whatever the run does about them.
    config = replace(config, data=replace(config.data, on_bad_sample="quarantine"))
    data = open_data(config, World(0, 0, 1, torch.device("cpu")))
    tables = {"sources": data.train, "validation": data.validation}
    return data.processor.template, {key: dataset for key, dataset in tables.items() if dataset is not None}


def show_source(template: Template, dataset: MultimodalDataset, source_id: int, table: str, num: int, colour: bool) -> bool:
    """Prints one source; whether it is certified."""
    index, source = dataset.indexes[source_id], dataset.sources[source_id]
    name = f"data.{table} {source.key}: {source.path}"
    with_media, planned = int((index.modalities > 0).sum()), index.lengths.mean()
    print(f"{name}\n{'=' * len(name)}\n{len(index):,} records, {with_media:,} with media, {planned:.0f} tokens planned on average")
    try:
        print(f"certificate: {certify(template, index, source.key)}")
        certified = True
    except DataError as error:
        print(f"certificate: REFUSED: {printable(str(error))}")
        certified = False
    first = int((dataset.source_ids < source_id).sum())
    for row in range(min(num, len(index))):
        print()
        print(entry(dataset[first + row], index, row, template, colour))
    print()
    return certified


def entry(item: Sample | Rejected, index: RecordIndex, row: int, template: Template, colour: bool) -> str:
    """A headline with the record's place and lengths, and the sample; or why there is none."""
    if isinstance(item, Rejected):
        return printable(f"{item.where} {item.id}: {'too long' if item.too_long else 'bad'}, not trained on: {item.reason}")
    record = parse(index.raw(row), index.where(row))
    return f"{record.where} {printable(record.id)}: {lengths(item)}\n{shown(item, record.media, template, colour)}"


def lengths(sample: Sample) -> str:
    media = {modality: sum(medium.length for medium in found) for modality, found in sample.media.items()}
    parts = [f"{len(sample.input_ids)} tokens", f"{int((sample.labels != IGNORE_INDEX).sum())} supervised"]
    return ", ".join([*parts, *(f"{tokens} of {modality}" for modality, tokens in media.items())])


def shown(sample: Sample, media: tuple[MediaRef, ...], template: Template, colour: bool) -> str:
    """The sample as text: stretches of supervised tokens, of other ones, and media, in their order."""
    learned = [False, *(sample.labels[:-1] != IGNORE_INDEX).tolist()]  # labels are shifted: position t says what t + 1 is
    files = {modality: iter([ref.path for ref in media if ref.modality == modality]) for modality in sample.media}
    placed = {medium.start: (modality, medium.length) for modality, found in sample.media.items() for medium in found}
    inside = {t for start, (_, length) in placed.items() for t in range(start, start + length)}
    pieces: list[str] = []
    for key, group in itertools.groupby(range(len(sample.input_ids)), key=lambda t: (t in inside, learned[t])):
        positions = list(group)
        if key[0]:
            for modality, length in (placed[t] for t in positions if t in placed):
                text = f"[{modality} {length} tokens: {printable(next(files[modality]))}]"
                pieces.append(f"{DIM}{text}{RESET}" if colour else text)
            continue
        text = printable(template.tokenizer.decode(sample.input_ids[positions].tolist(), skip_special_tokens=False))
        left, right = (GREEN, RESET) if colour else ("{+", "+}")
        pieces.append(f"{left}{text}{right}" if key[1] else text)
    return "".join(pieces).rstrip("\n")


def inspect(options: argparse.Namespace) -> None:
    if options.num < 0:
        raise ConfigError(f"--num {options.num} is negative")
    config = load_config(options.cfg, options.overrides)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    template, datasets = open_sources(config)
    refused = [
        source.key
        for table, dataset in datasets.items()
        for i, source in enumerate(dataset.sources)
        if not show_source(template, dataset, i, table, options.num, colour)
    ]
    if refused:
        raise DataError(f"the run would refuse {', '.join(refused)}: see the certificates above")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.inspect_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", required=True, help="the run file")
    parser.add_argument("--num", type=int, default=3, help="samples of each source (3)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    options = parser.parse_intermixed_args(argv)  # options may stand before the last positional
    return run("inspect_data", lambda: inspect(options))


if __name__ == "__main__":
    raise SystemExit(main())
