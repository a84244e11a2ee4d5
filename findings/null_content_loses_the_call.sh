#!/usr/bin/env bash
# A chat template that asks "is the content none?" never gets a yes from transformers.
#
# Versions  transformers 5.23.0, tokenizers 0.23.3, Jinja2 3.1.6, numpy 2.4.6
# Guess     An assistant turn that only calls a tool has `"content": None`. The message reaches the template as it was
#           given, so `message['content'] is none` is true, the same as when Jinja2 renders the template alone.
# Instead   `apply_chat_template` first removes every key of a message whose value is None (only of the message itself:
#           a None deeper inside stays). In the template the content is then undefined, which is not none. A template
#           written in DeepSeek-V3's way takes its other branch. Where that branch joins with `~`, the call vanishes from
#           the prompt without a word; where it joins with `+`, Jinja2 raises UndefinedError. Asking `message['tool_calls']`
#           or `not message['content']` works both ways.
# Seen      Jinja2 alone   user: What time is it?|[call clock zone=None]
#           transformers   user: What time is it?|assistant: |
#           with +         UndefinedError: 'dict object' has no attribute 'content'
#           asks for calls user: What time is it?|[call clock zone=None]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 Jinja2==3.1.6 numpy==2.4.6

cd "$work"
venv/bin/python - <<'PYTHON'
import copy

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CALL = "[call {{ call.name }} zone={{ call.arguments.zone }}]"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if TEST %}{% set call = message['tool_calls'][0]['function'] %}" + CALL +
    "{% else %}{{ message['role'] JOIN ': ' JOIN message['content'] JOIN '|' }}{% endif %}"
    "{% endfor %}"
)


def template(test, join):
    return TEMPLATE.replace("TEST", test).replace("JOIN", join)


by_none = template("message['content'] is none", "~")
by_none_plus = template("message['content'] is none", "+")
by_calls = template("message['tool_calls']", "~")

chat = [
    {"role": "user", "content": "What time is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": None}}}],
    },
]
given = copy.deepcopy(chat)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def rendered(text):
    return tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False)


alone = jinja2.Environment().from_string(by_none).render(messages=chat)
print("Jinja2 alone  ", alone)
assert alone == "user: What time is it?|[call clock zone=None]"
assert jinja2.Environment().from_string(by_none_plus).render(messages=chat) == alone

inside = rendered(by_none)
print("transformers  ", inside)
assert inside == "user: What time is it?|assistant: |"

try:
    rendered(by_none_plus)
except jinja2.UndefinedError as error:
    print("with +         UndefinedError:", error)
    assert str(error) == "'dict object' has no attribute 'content'"
else:
    raise AssertionError("the template with + was rendered")

other = rendered(by_calls)
print("asks for calls", other)
assert other == rendered(template("not message['content']", "~")) == alone  # and the None inside the arguments is still there
assert chat == given  # the caller's own messages are not touched
PYTHON
