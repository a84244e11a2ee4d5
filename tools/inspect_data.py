"""Show what the model will see: samples of every source as they reach it, with learned tokens marked, in the terminal or as a page.

In the terminal supervised tokens are green, or stand in {+ +} where there is no colour or NO_COLOR is set; answers that are not
learned, because their turns say so, are grey, or stand in {- -}; answers to which others are preferred are red, or stand in {~ ~};
a medium is shown by the tokens it takes and its file. --html
writes one file for a browser, with the pictures, the frames and the sounds that the model receives.
Indexes are written where the run itself will look for them; no weight is read.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.records.fields import shorten
from model.errors import ConfigError, DataError
from tools.cli import check_named, command_parser, printable_lines, run_command, write_named
from tools.inspector.wanted import KINDS, Wanted
from trainer.runfile.toml_files import without_dashes

if TYPE_CHECKING:
    from tools.inspector.answers import AnswerText
    from tools.inspector.choose import Source
    from tools.inspector.entry import Box, InspectorEntry, Piece

GREEN, RED, GREY, DIM, RESET = "\x1b[32m", "\x1b[31m", "\x1b[90m", "\x1b[2m", "\x1b[0m"
MARKS = {"learned": (GREEN, "{+", "+}"), "passed over": (GREY, "{-", "-}"), "unwanted": (RED, "{~", "~}")}
"""The colour of a stretch of tokens, and the marks around it where there is no colour."""
NUM_PRINTED, NUM_ON_PAGE = 3, 50


def print_source(source: Source, colour: bool) -> bool:
    """Print one source; return whether the run would refuse it."""
    from tools.inspector.sources_page import certified  # here, as below: --help needs no torch

    name = printable_lines(f"data.{source.table} {source.config.key}: {source.config.path}")
    ids = source.pool.ids
    media = [f"{int((source.dataset.modalities[ids] > 0).sum()):,} with media"]
    media += [f"{count:,} with {kind}" for kind, count in source.kinds.items()]
    planned = f"{source.dataset.lengths[ids].mean():.0f} tokens planned on average ({source.opened.lengths_kind})"
    certificate, refused = certified(source)
    print(f"{name}\n{'=' * len(name)}")
    print(", ".join(filter(None, [f"{source.pool.size:,} records", source.part, *media, planned])))
    print(f"certificate: {'REFUSED: ' * refused}{printable_lines(certificate)}")
    for entry in source.entries():
        print(f"\n{entry_text(entry, colour)}")
    print("" if source.chosen else "\nnone of its records is shown: none fits the choice\n")
    return refused


def entry_text(entry: InspectorEntry, colour: bool) -> str:
    """Return a headline with the record's place and lengths, and the sample; or why the record is not trained on."""
    headline = f"{entry.where} {shorten(entry.id)}:"
    if entry.status not in ("trained", "shortened"):
        return printable_lines(f"{headline} {entry.status}, not trained on: {entry.reason}")
    parts = [f"{entry.num_tokens} tokens", f"{entry.num_learned} supervised"]
    if entry.num_unlearned:
        parts.append(f"{entry.num_unlearned} answer{'s' * (entry.num_unlearned > 1)} not learned ({'grey' if colour else '{- -}'})")
    if entry.num_removed:
        parts.append(f"{entry.num_removed} earlier answer{'s' * (entry.num_removed > 1)} without thoughts")
    for modality, boxes in itertools.groupby(sorted(entry.boxes, key=_modality), key=_modality):
        parts.append(f"{sum(box.medium.length for box in boxes)} of {modality}")
    parts += [f"{entry.planned} planned", *([entry.reason] if entry.reason else [])]
    return f"{printable_lines(f'{headline} ' + ', '.join(parts))}\n{sample_text(entry, colour)}"


def _modality(box: Box) -> str:
    return box.medium.kind


def sample_text(entry: InspectorEntry, colour: bool) -> str:
    """Return the sample as text: stretches of supervised tokens, of other ones, and media, in their order."""
    from tools.inspector.entry import Box

    stretches: list[str] = []
    for mark, group in itertools.groupby(entry.pieces, key=_mark):
        if mark == "box":
            texts = [f"[{box.medium.kind} {box.facts}: {printable_lines(box.path)}]" for box in group if isinstance(box, Box)]
            stretches += [f"{DIM}{text}{RESET}" if colour else text for text in texts]
            continue
        text = printable_lines("".join(piece.text for piece in group if not isinstance(piece, Box)))
        stretches.append(_marked(text, mark, colour))
    answers = (f"\n{answer.role}: {_answer_text(answer, colour)}" for answer in entry.answers)
    return "".join(stretches).rstrip("\n") + "".join(answers)


def _marked(text: str, mark: str, colour: bool) -> str:
    hue, left, right = MARKS.get(mark, ("", "", ""))
    return f"{hue}{text}{RESET if hue else ''}" if colour else f"{left}{text}{right}"


def _answer_text(answer: AnswerText, colour: bool) -> str:
    """Return an answer that is compared with another one, in the colour of those that are wanted, or are not."""
    made = []
    for counts, group in itertools.groupby(answer.pieces, key=lambda piece: piece.learned):
        text = printable_lines("".join(piece.text for piece in group))
        made.append(_marked(text, ("learned" if answer.is_wanted else "unwanted") if counts else "", colour))
    return "".join(made).rstrip("\n")


def _mark(piece: Piece | Box) -> str:
    from tools.inspector.entry import Box

    if isinstance(piece, Box):
        return "box"
    return "learned" if piece.learned else "passed over" if piece.passed_over else "read"


def write_page(file: Path, title: str, words: str, sources: list[Source]) -> list[bool]:
    """Write the page; return, for each source, whether the run would refuse it."""
    from tools.inspector.sources_page import sources_page

    text, refusals = sources_page(title, words, sources)
    write_named("--html", file, text)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB, {sum(len(s.chosen) for s in sources):,} records: open it in a browser")
    return refusals


def wanted_of(options: argparse.Namespace) -> Wanted:
    if options.num is not None and options.num < 1:
        raise ConfigError(f"--num {options.num} is not positive")
    if options.step is not None and (options.run is None or options.longest or options.quarantined):
        raise ConfigError("--step shows what one step of a run was trained on: it needs --run and goes with no other choice")
    num = options.num
    if num is None and options.step is None:
        num = NUM_ON_PAGE if options.html else NUM_PRINTED
    only = (options.longest, options.quarantined, options.html is not None and options.step is None, options.step)
    return Wanted(num, options.source, options.modality, *only)


def inspect(options: argparse.Namespace) -> None:
    wanted = wanted_of(options)
    check_named("--html", options.html)
    from model.deferred_imports import import_transformers

    import_transformers()
    from tools.inspector.choose import choose_samples, open_sources, stage_to_inspect

    sources = choose_samples(open_sources(stage_to_inspect(options.cfg, options.run, options.overrides, options.stage)), wanted)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if options.html:
        refusals = write_page(options.html, options.cfg or options.run, wanted.words, sources)
    else:
        refusals = [print_source(source, colour) for source in sources]
    refused = [source.config.key for source, bad in zip(sources, refusals) if bad]
    if refused:
        raise DataError(f"the run would refuse {', '.join(refused)}: see the certificates above")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("inspect_data", __doc__)
    parser.add_argument("--cfg", help="the run file")
    parser.add_argument("--run", help="in its place: the folder of a run, whose own run.toml is read")
    parser.add_argument("--stage", default="", metavar="NAME", help="of a run with [[stage]] tables: this one")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser, in place of printing")
    parser.add_argument("--num", type=int, help=f"samples of each source ({NUM_PRINTED}; {NUM_ON_PAGE} on a page; all of a step)")
    parser.add_argument("--source", default="", metavar="NAME", help="this source alone")
    parser.add_argument("--modality", default="", choices=KINDS, help="records that hold this kind of medium, or text alone")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--longest", action="store_true", help="the longest ones, by planned length")
    order.add_argument("--quarantined", action="store_true", help="what the run quarantined")
    order.add_argument("--step", type=int, metavar="N", help="with --run: what brought it from N to N + 1 completed steps")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    options = parser.parse_intermixed_args(without_dashes(argv))  # options may stand before the last positional
    return run_command("inspect_data", lambda: inspect(options))


if __name__ == "__main__":
    raise SystemExit(main())
