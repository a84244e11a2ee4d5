#!/usr/bin/env bash
# On a CPU, a token under is_causal=True is poisoned by a value that is not a number of a later token, if both are in one block of 512.
#
# Versions  torch 2.13.0, scaled_dot_product_attention on a CPU
# Guess     A causal query never meets what comes after it: with a NaN in the value of token 700 of 1,100, as an overflow in float16
#           leaves it, the results of tokens 0 to 699 are what they were, to the bit.
# Instead   The kernel takes keys and values in blocks of 512 and leaves out only blocks that begin behind its queries. Inside a block
#           the later tokens are multiplied by probabilities of 0, and 0 times NaN is NaN: tokens 512 to 699 are lost, tokens 0 to
#           511 are as before. Of up to 512 tokens all are. Infinity does the same. The plain formula (SDPBackend.MATH) loses all 700.
#           For the same reason is_causal saves no time below 512 tokens: the masked half is computed.
# Seen      1,100 tokens, NaN at 700: first lost 512, as under bfloat16; 300 tokens, NaN at 299: first lost 0; math: first lost 0.
#           Time of causal over whole attention, forward and backward: 1.0 at 384 tokens.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > reach.py <<'PYTHON'
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)


def first_lost(tokens, at, dtype=torch.float32, bad=float("nan")):
    """Return the first token whose result a value at `at` that is no number changes, and whether all before it keep theirs."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, tokens, 64, dtype=dtype) for _ in range(3))
    before = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    value[:, :, at] = bad
    after = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    first = int((~torch.isfinite(after)).any(-1).any(1)[0].nonzero()[0])
    assert torch.equal(after[:, :, :first], before[:, :, :first])
    return first


def seconds(causal, tokens=384):
    """Return the CPU time of forward and backward."""
    inputs = [torch.randn(1, 8, tokens, 64, requires_grad=True) for _ in range(3)]
    start = time.process_time()
    F.scaled_dot_product_attention(*inputs, is_causal=causal).sum().backward()
    return time.process_time() - start


for dtype in (torch.float32, torch.bfloat16):
    for tokens, at, expected in ((300, 299, 0), (1100, 700, 512), (1100, 520, 512), (2000, 1999, 1536)):
        for bad in (float("nan"), float("inf")):
            found = first_lost(tokens, at, dtype, bad)
            print(f"{tokens} tokens of {dtype}, {bad} at {at}: first lost {found}")
            assert found == expected
with sdpa_kernel(SDPBackend.MATH):
    assert first_lost(1100, 700) == 0
rounds = [seconds(True) / seconds(False) for _ in range(40)]
print(f"causal / whole at 384 tokens: {statistics.median(rounds):.2f} of the CPU time")
PYTHON
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
venv/bin/python reach.py
