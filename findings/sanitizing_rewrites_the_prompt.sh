#!/usr/bin/env bash
# Sanitizing control tokens changes which words are in the prompt, not only their ids.
#
# Versions  transformers 5.23.0, tokenizers 0.23.3, Jinja2 3.1.6, numpy 2.4.6
# Guess     `apply_chat_template(..., sanitize_control_tokens=True)` renders the same text as without it, and only
#           encodes what looks like a control token in a message letter by letter. So the decoded prompts are equal.
# Instead   While the template runs, each such token in the messages stands between two invisible private-use
#           characters, and the template's own tests meet them. Two habits of templates like Qwen3's then fail:
#             1. "is this user turn really a tool's answer?", asked with startswith('<tool_response>'), is now no. The
#                turn counts as a new question, and the reasoning before it leaves the prompt;
#             2. strip('\n') on a thought that was cut out between <think> and </think> strips nothing, as the text no
#                longer starts or ends with a line break. The model's past turns get blank lines it never wrote.
#           Both chats are ordinary ones that nobody has tampered with.
# Seen      1 plain      user: Rain?\nassistant: <think>Ask the station.</think>call\nuser: <tool_response>dry</tool_response>\n
#           1 sanitized  user: Rain?\nassistant: call\nuser: <tool_response>dry</tool_response>\n
#           2 plain      <think>\nshort\n</think>\n\nyes
#           2 sanitized  <think>\n\nshort\n\n</think>\n\n\n\nyes
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 Jinja2==3.1.6 numpy==2.4.6

cd "$work"
venv/bin/python - <<'PYTHON'
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# One id per byte, and four added tokens that are not special, as in Qwen3's tokenizer.
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
core.decoder = decoders.ByteLevel()
names = ["<think>", "</think>", "<tool_response>", "</tool_response>"]
core.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)


def text(chat, template, sanitize):
    ids = tokenizer.apply_chat_template(chat, chat_template=template, sanitize_control_tokens=sanitize)["input_ids"]
    return tokenizer.decode(ids)


# 1. Reasoning is kept only after the last question; a tool's answer is no question.
keeps_reasoning = r"""
{%- set seen = namespace(question=-1) %}
{%- for m in messages %}
  {%- set answer = m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}
  {%- if m.role == 'user' and not answer %}{%- set seen.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
  {{- m.role ~ ': ' }}
  {%- if m.reasoning_content and loop.index0 > seen.question %}
    {{- '<think>' ~ m.reasoning_content ~ '</think>' }}
  {%- endif %}
  {{- m.content ~ '\n' }}
{%- endfor %}"""
chat = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "reasoning_content": "Ask the station.", "content": "call"},
    {"role": "user", "content": "<tool_response>dry</tool_response>"},
]
plain, sanitized = (text(chat, keeps_reasoning, sanitize) for sanitize in (False, True))
print("1 plain     ", plain.replace("\n", r"\n"))
print("1 sanitized ", sanitized.replace("\n", r"\n"))
thought = "<think>Ask the station.</think>"
assert thought in plain
assert sanitized == plain.replace(thought, "")

# 2. The thought is cut out of the content, stripped, and set between the tags again.
sets_thought = r"""
{%- for m in messages %}
  {%- set before, after = m.content.split('</think>') %}
  {{- '<think>\n' ~ before.split('<think>')[1].strip('\n') ~ '\n</think>\n\n' ~ after.strip('\n') }}
{%- endfor %}"""
chat = [{"role": "assistant", "content": "<think>\nshort\n</think>\n\nyes"}]
plain, sanitized = (text(chat, sets_thought, sanitize) for sanitize in (False, True))
print("2 plain     ", plain.replace("\n", r"\n"))
print("2 sanitized ", sanitized.replace("\n", r"\n"))
assert plain == chat[0]["content"]  # a faithful round trip
assert sanitized == "<think>\n\nshort\n\n</think>\n\n\n\nyes"
PYTHON
