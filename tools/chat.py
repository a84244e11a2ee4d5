"""Answer one question or, without a question, hold a conversation: one line of stdin per turn, until it ends.

Media belong to the first turn; they stand before its text, or where the text says <image>, <video> and <audio>. A question that
is spoken needs no text: "". Answers are printed as they come. A model trained with state tokens says whether it accepts the sound.
In a conversation /image FILE, /audio FILE and /video FILE attach to the next turn, whose line may be blank; /new starts anew.
--page holds conversations on a page in a browser of this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from data.processor import Processor, load_processor
from data.records.record import Record, RecordError, Turn
from data.text.rounds import THOUGHTFUL
from model.errors import ConfigError, DataError
from model.media_spec import PLACEHOLDERS
from tools.chatting.conversation import STATES, Answerer, Conversation, make_answerer
from tools.chatting.serve import ChatServer
from tools.cli import check_positive, command_parser, printable_lines, run_command
from tools.local_page import serve_page
from tools.model_options import add_model_options, load

KINDS = tuple(f"/{kind}" for kind in PLACEHOLDERS)


def show(state: str | None, piece: str) -> None:
    """Print a piece of an answer on stdout, and the state that the model reports on stderr."""
    if state is not None:
        print(f"chat: {STATES[state]}", file=sys.stderr, flush=True)
    print(printable_lines(piece), end="", flush=True)


def ask(talk: Conversation, words: str, answer: Answerer, *, keep: bool = True) -> None:
    """Ask, and print the answer as it comes; `keep` the round for the next. Raises `RecordError`."""
    told: list[str] = []

    def tell(state: str | None, piece: str) -> None:
        show(state, piece)
        told.append(piece)

    try:
        state, _ = talk.ask(words, answer, tell, keep=keep)
    except RecordError:
        if any(told):
            print(flush=True)
        raise
    print(flush=True)
    if keep and state == "negative":
        print("chat: this round is not kept", file=sys.stderr, flush=True)


def converse(talk: Conversation, answer: Answerer, *, prompt: str) -> None:
    """Answer line by line."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        if command == "/new":
            talk.restart()
        elif command in KINDS:
            attach(talk, command[1:], value.strip())
        elif line or talk.waiting:
            try:
                ask(talk, line, answer)
            except RecordError as error:
                print(f"chat: {printable_lines(talk.explain(error))}; this round is not kept", file=sys.stderr)


def attach(talk: Conversation, kind: str, path: str) -> None:
    """Attach what a line of the conversation names, and say so."""
    said = f"attached to the next turn: {talk.attach(kind, path)} x {kind}" if Path(path).exists() else f"{path!r} does not exist"
    print(f"chat: {printable_lines(said)}", file=sys.stderr, flush=True)


def prompts_alike(processor: Processor) -> bool:
    """Return whether the template has the same prompt for answers with and without a thought."""
    asked = Record("question", (Turn("user", "a"),), (), "question")
    return processor.template.prompt(asked) == processor.template.prompt(asked, THOUGHTFUL)


def chat(options: argparse.Namespace) -> None:
    check_positive(options, "max_new_tokens")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError(f"--temperature {options.temperature} must be at least 0 and --top-p {options.top_p} in (0, 1]")
    if options.temperature == 0 and (options.top_p < 1 or options.seed is not None):
        raise ConfigError("--top-p and --seed have no effect at --temperature 0, where the likeliest token is always taken")
    processor = load_processor(options.final)
    if options.thinking and prompts_alike(processor):
        raise ConfigError("--thinking has no effect: the run's template has the same prompt for answers with and without a thought")
    if options.page and (options.question is not None or any(getattr(options, kind) for kind in PLACEHOLDERS)):
        raise ConfigError("--page takes questions and media on the page: leave those of the command line out")
    answer = make_answerer(load(options), processor, options)
    with tempfile.TemporaryDirectory(prefix="chat") as folder:
        if options.page:
            talks_with = f"talks with {options.final}"
            serve_page(lambda port: ChatServer(answer, Path(folder), str(options.final), port), options.port, talks_with)
            return
        talk = Conversation(Path(folder))
        for kind in PLACEHOLDERS:
            for file in getattr(options, kind):
                talk.attach(kind, file)
        if options.question is None:
            converse(talk, answer, prompt="> " if sys.stdin.isatty() else "")
            return
        try:
            ask(talk, options.question, answer, keep=False)
        except RecordError as error:  # the record was made here: its place and id mean nothing to the user
            raise DataError(talk.explain(error)) from error


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("chat", __doc__)
    add_model_options(parser)
    parser.add_argument("question", nargs="?", help="without it, a conversation is read from stdin")
    media = {"image": "a picture, or a folder of some", "audio": "a clip", "video": "a video, or a folder of its frames"}
    for kind, what in media.items():
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help=f"{what}; may be given more than once")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token; above, samples")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this much probability (1)")
    parser.add_argument("--seed", type=int, default=None, help="of the sampling")
    parser.add_argument("--thinking", action="store_true", help="ask as for answers that begin with a thought (docs/thinking.md)")
    parser.add_argument("--page", action="store_true", help="hold conversations on a page in a browser of this machine")
    parser.add_argument("--port", type=int, default=0, help="port of the page (default: a free one)")
    options = parser.parse_intermixed_args(argv)  # options may stand before the last positional
    return run_command("chat", lambda: chat(options))


if __name__ == "__main__":
    raise SystemExit(main())
