"""Answer one question or, without a question, hold a conversation: one line of stdin per turn, until it ends.

Media belong to the first turn; they stand before its text, or where the text says <image>, <video> and <audio>. A question that
is spoken needs no text: "". A model trained with state tokens says whether it accepts the sound.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from data.processor import Processor, load_processor
from data.records.record import Record, RecordError, Turn, parse
from data.text.rounds import THOUGHTFUL
from model.errors import ConfigError, DataError
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS
from model.multimodal import MultimodalLM
from tools.cli import command_parser, printable_lines, run_command
from tools.model_options import add_model_options, load

Turns = list[dict[str, str]]  # "from" and "value", as in records
Media = dict[str, list[str]]  # files by kind
Answer = tuple[str | None, str]  # the state that the model reports, see `data.text.state_tokens`, and the text
STATES = {
    "audio": "accepted: speech that was meant for the model",
    "text": "accepted: a question in writing",
    "negative": "rejected: the sound was not meant for the model",
}


def answerer(net: MultimodalLM, processor: Processor, media: Media, options: argparse.Namespace) -> Callable[[Turns], Answer]:
    """Return a function that answers the last of some turns."""
    sampling: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}

    def answer(turns: Turns) -> Answer:
        batch = processor([record(turns, media)], thinking=options.thinking)
        ids = net.generate(batch, max_new_tokens=options.max_new_tokens, **sampling)
        return processor.answers(ids)[0]  # the text has no state token: the template writes it again in the next round

    return answer


def record(turns: Turns, media: Media) -> Json:
    return {"conversations": turns, **{kind: files for kind, files in media.items() if files}}


def converse(answer: Callable[[Turns], Answer], media: Media, *, prompt: str) -> None:
    """Answer line by line.

    A round is shown and then forgotten if no record could hold it, such as one with an empty answer, or if the model rejects it.
    """
    turns: Turns = []
    while (line := read_line(prompt)) is not None:
        asked = [*turns, {"from": "human", "value": line}]
        try:
            state, text = answer(asked)
            show(state, text, "; this round is not kept" if state == "negative" else "")
            asked.append({"from": "gpt", "value": text})
            parse(record(asked, media), "conversation")
        except RecordError as error:
            print(f"chat: {printable_lines(told(error))}; this round is not kept", file=sys.stderr)
            continue
        turns = turns if state == "negative" else asked


def told(error: RecordError) -> str:
    """Return what is wrong with a round in the words of a conversation: its record was made here, and nobody wrote one."""
    counted = re.fullmatch(r"(\d+) <(\w+)> in the turns, (\d+) \w+ files in the record", error.reason)
    if counted:
        number, kind, given = counted.groups()
        return f"{kind}: {number} <{kind}> in the text, and {given} --{kind} FILE named: give as many of one as of the other"
    return f"{error.field}: {error.reason}"


def show(state: str | None, text: str, note: str = "") -> None:
    """Print the answer on stdout and the state that the model reports on stderr."""
    if state is not None:
        print(f"chat: {STATES[state]}{note}", file=sys.stderr, flush=True)
    print(printable_lines(text), flush=True)


def read_line(prompt: str) -> str | None:
    """Return the next line that is not blank, or None at the end of stdin."""
    while True:
        try:
            if line := input(prompt).strip():
                return line
        except EOFError:
            return None


def prompts_alike(processor: Processor) -> bool:
    """Return whether the template has the same prompt for answers with and without a thought."""
    asked = Record("question", (Turn("user", "a"),), (), "question")
    return processor.template.prompt(asked) == processor.template.prompt(asked, THOUGHTFUL)


def chat(options: argparse.Namespace) -> None:
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {options.max_new_tokens} is not positive")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError(f"--temperature {options.temperature} must be at least 0 and --top-p {options.top_p} in (0, 1]")
    if options.temperature == 0 and (options.top_p < 1 or options.seed is not None):
        raise ConfigError("--top-p and --seed have no effect at --temperature 0, where the likeliest token is always taken")
    processor = load_processor(options.final)
    if options.thinking and prompts_alike(processor):
        raise ConfigError("--thinking has no effect: the run's template has the same prompt for answers with and without a thought")
    media = {kind: getattr(options, kind) for kind in PLACEHOLDERS}
    answer = answerer(load(options), processor, media, options)
    if options.question is None:
        converse(answer, media, prompt="> " if sys.stdin.isatty() else "")
    else:
        try:
            show(*answer([{"from": "human", "value": options.question}]))
        except RecordError as error:  # the record was made here: its place and id mean nothing to the user
            raise DataError(told(error)) from error


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("chat", __doc__)
    add_model_options(parser)
    parser.add_argument("question", nargs="?", help="without it, a conversation is read from stdin")
    for kind, what in (("image", "a picture"), ("audio", "a clip"), ("video", "a video, or a folder of its frames")):
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help=f"{what}; may be given more than once")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token; above, samples")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this much probability (1)")
    parser.add_argument("--seed", type=int, default=None, help="of the sampling")
    parser.add_argument("--thinking", action="store_true", help="ask as for answers that begin with a thought (docs/thinking.md)")
    options = parser.parse_intermixed_args(argv)  # options may stand before the last positional
    return run_command("chat", lambda: chat(options))


if __name__ == "__main__":
    raise SystemExit(main())
