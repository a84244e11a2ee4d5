"""Generate greedy answers to held-out records and compare them with the records' own.

A record's prompt is everything before its last answer. Measures, by --metrics: exact_match, the share of records whose generated
text equals that answer, without its state token, white space around both stripped; anls, wer, choice, contains, bleu: see
docs/training.md. loss: cross entropy per supervised token, over all answers of the kept rounds, as in training. --preferences
compares the chosen and the rejected answer of every record in place of answering. Under torchrun the ranks share the records; the
numbers are the same.

Progress goes to stderr, a table to stdout; the last line of stdout is JSON: {"samples", every measure, "loss"}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from typing import Any

import torch
from tqdm import tqdm

from data.index.record_index import RecordIndex
from data.processor import Processor, load_processor
from data.records.record import Record, parse
from model.errors import ConfigError
from model.multimodal import MultimodalLM
from tools.cli import check_named, check_positive, command_parser, run_command, write_named
from tools.evaluation.answer_formats import FORMATS, format_answers
from tools.evaluation.answering import Answered, Totals, answers, open_records
from tools.evaluation.preferring import Pair, compare_answers, preference_result
from tools.evaluation.wrong_answers_page import WrongAnswer, is_wrong, wrong_answers_page
from tools.model_options import add_model_options, load
from trainer.distributed.world import World, start_world, stop_world
from trainer.scores.text_metrics import METRICS, check_metrics

__all__ = ["Answered", "Totals", "answers", "evaluate", "main"]


def evaluate(options: argparse.Namespace, world: World) -> None:
    """Answer, measure, and write on rank 0 what the options ask for. Collective."""
    metrics = check_options(options)
    if world.is_main:  # the one that writes
        check_named("--page", options.page)
        check_named("--predictions", options.predictions)
    totals = Totals()
    with tempfile.TemporaryDirectory() as folder:
        processor = load_processor(options.final)
        index = open_records(options.data, processor, folder)
        net = load(options)
        if options.preferences:
            return evaluate_preferences(options, world, net, processor, index)
        settings: dict[str, Any] = {key: getattr(options, key) for key in ("media_root", "max_new_tokens", "batch_size")}
        own = answers(net, processor, index, **settings, share=(world.rank, world.size))
        with tqdm(total=len(index), unit="sample", desc="evaluate", dynamic_ncols=True, disable=not world.is_main) as bar:
            for answered in own:
                totals.add(answered)
                bar.update(len(answered.records) * world.size if bar.n + len(answered.records) * world.size <= len(index) else 0)
        totals = totals.shared(world)
        if world.is_main:
            write_results(options, metrics, totals, processor, index)


def evaluate_preferences(
    options: argparse.Namespace, world: World, net: MultimodalLM, processor: Processor, index: RecordIndex
) -> None:
    """Compare the answers of all records, and print on rank 0 how often the chosen one is more probable. Collective."""
    pairs: dict[int, Pair] = {}
    share, size = (world.rank, world.size), options.batch_size
    with tqdm(total=len(index), unit="sample", desc="compare", dynamic_ncols=True, disable=not world.is_main) as bar:
        for found in compare_answers(net, processor, index, media_root=options.media_root, batch_size=size, share=share):
            pairs |= found
            bar.update(min(len(found) * world.size, len(index) - bar.n))
    together = {i: pair for rank in world.gather_json(list(pairs.items())) for i, pair in rank}
    if world.is_main:
        print_result(options, preference_result(together))


def print_result(options: argparse.Namespace, result: dict[str, float]) -> None:
    """Print the table, unless the line of JSON alone is asked for, and that line."""
    if not options.json:
        print(score_lines(result), flush=True)
    print(json.dumps({key: value if math.isfinite(value) else None for key, value in result.items()}))


def check_options(options: argparse.Namespace) -> list[str]:
    """Return the measures that are asked for. Raises `ConfigError` for options that cannot be."""
    check_positive(options, "max_new_tokens", "batch_size")
    metrics = list(dict.fromkeys(filter(None, options.metrics.split(","))))
    if not metrics:
        raise ConfigError(f"--metrics {options.metrics!r} names none: write some of {','.join(METRICS)}")
    check_metrics(metrics, "--metrics")
    if options.preferences and (options.page or options.predictions):
        raise ConfigError("--preferences generates nothing: it goes without --page and --predictions")
    if options.format and not options.predictions:
        raise ConfigError(f"--format {options.format} is of the file that --predictions FILE names: name it")
    return metrics


def write_results(
    options: argparse.Namespace, metrics: list[str], totals: Totals, processor: Processor, index: RecordIndex
) -> None:
    """Write predictions and page where they are asked for, and print the table and the line of JSON."""
    result = totals.result(metrics)
    records = {i: parse(index.raw(i), index.where(i), index.name(i)) for i in totals.texts}
    if options.predictions:
        write_named("--predictions", options.predictions, predictions_of(options.format, records, totals))
    if options.page:
        found = [(i, text, totals.expected[i]) for i, text in totals.texts.items()]
        wrong = [WrongAnswer(records[i], text, right) for i, text, right in found if is_wrong(metrics[0], text, right)]
        title = f"{options.final} on {options.data}"
        write_named("--page", options.page, wrong_answers_page(title, result, wrong, processor, options.media_root))
    print_result(options, result)


def predictions_of(name: str, records: dict[int, Record], totals: Totals) -> str:
    """Return the file of all answers, in the form `name`; "": ours, a JSON object per line."""
    if name:
        return format_answers(name, list(records.values()), list(totals.texts.values()))
    rows = [
        {"id": record.id, "where": record.where, "expected": totals.expected[i], "generated": totals.texts[i]}
        for i, record in records.items()
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def score_lines(result: dict[str, float]) -> str:
    """Return the numbers for people, a line each."""
    width = max(12, *map(len, result))
    return "\n".join(
        f"{name:<{width}} {value:>10,.4f}" if name != "samples" else f"{name:<{width}} {value:>10,}"
        for name, value in result.items()
    )


def run_on_ranks(options: argparse.Namespace) -> None:
    """Evaluate on the ranks that a launcher started, or in this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return evaluate(options, World(0, 0, 1, torch.device("cpu")))
    world = start_world()
    if options.device == "auto":
        options.device = str(world.device)
    try:
        evaluate(options, world)
    finally:
        stop_world()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser("evaluate", __doc__)
    add_model_options(parser)
    parser.add_argument("--data", required=True, help="held-out records, .json or .jsonl, in the form that training reads")
    parser.add_argument("--media-root", default="", metavar="DIR", help="the folder media must stand in; default: this one")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (128)")
    parser.add_argument("--batch-size", type=int, default=16, help="records answered at once (16)")
    parser.add_argument("--metrics", default="exact_match", metavar="LIST", help=f"of {','.join(METRICS)} (exact_match)")
    parser.add_argument(
        "--preferences", action="store_true", help="compare chosen and rejected answers of the records; nothing is generated"
    )
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument(
        "--page", default="", metavar="FILE", help="also write a page of the answers that the first measure finds wrong"
    )
    parser.add_argument("--predictions", default="", metavar="FILE", help="also write every answer, one JSON object per line")
    known = "write --predictions as LLaVA's evaluation of a benchmark reads them"
    parser.add_argument("--format", default="", choices=["", *FORMATS], metavar="NAME", help=f"{known}: {', '.join(FORMATS)}")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return run_command("evaluate", lambda: run_on_ranks(options))


if __name__ == "__main__":
    raise SystemExit(main())
