"""One answer to a question, or, without a question, a conversation: one line of stdin per turn, until it ends.

Images belong to the first turn; they stand before its text, or where the text says <image>.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from data.processor import Processor, load_processor
from data.record import RecordError, parse
from model.config import ConfigError
from model.multimodal import MultimodalLM
from tools.cli import printable, run
from tools.final import add_model_options, load

Turns = list[dict[str, str]]  # "from" and "value", as in records


def answerer(net: MultimodalLM, processor: Processor, images: list[str], options: argparse.Namespace) -> Callable[[Turns], str]:
    """What answers the last of some turns."""
    sampling: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}

    def answer(turns: Turns) -> str:
        batch = processor([record(turns, images)])
        return processor.decode(net.generate(batch, max_new_tokens=options.max_new_tokens, **sampling))[0]

    return answer


def record(turns: Turns, images: list[str]) -> dict[str, Any]:
    return {"conversations": turns, **({"image": images} if images else {})}


def converse(answer: Callable[[Turns], str], images: list[str], *, prompt: str) -> None:
    """Answers line by line. A round that no record could hold, as one with an empty answer, is shown and then forgotten."""
    turns: Turns = []
    while (line := read_line(prompt)) is not None:
        asked = [*turns, {"from": "human", "value": line}]
        try:
            text = answer(asked)
            print(printable(text), flush=True)
            asked.append({"from": "gpt", "value": text})
            parse(record(asked, images), "conversation")
        except RecordError as error:
            print(f"chat: {error.field}: {printable(error.reason)}; this round is not kept", file=sys.stderr)
            continue
        turns = asked


def read_line(prompt: str) -> str | None:
    """The next line that is not blank, or None at the end of stdin."""
    while True:
        try:
            if line := input(prompt).strip():
                return line
        except EOFError:
            return None


def chat(options: argparse.Namespace) -> None:
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {options.max_new_tokens} is not positive")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError(f"--temperature {options.temperature} must be at least 0 and --top-p {options.top_p} in (0, 1]")
    if options.temperature == 0 and (options.top_p < 1 or options.seed is not None):
        raise ConfigError("--top-p and --seed have no effect at --temperature 0, where the likeliest token is always taken")
    processor = load_processor(options.final)
    answer = answerer(load(options), processor, options.image, options)
    if options.question is None:
        converse(answer, options.image, prompt="> " if sys.stdin.isatty() else "")
    else:
        print(printable(answer([{"from": "human", "value": options.question}])))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("question", nargs="?", help="without it, a conversation is read from stdin")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given more than once")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token; above, samples")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this much probability (1)")
    parser.add_argument("--seed", type=int, default=None, help="of the sampling")
    options = parser.parse_intermixed_args(argv)  # options may stand before the last positional
    return run("chat", lambda: chat(options))


if __name__ == "__main__":
    raise SystemExit(main())
