#!/usr/bin/env bash
# Under autocast, saving memory with LinearCrossEntropyOptions turns the float32 loss of a head into a bfloat16 one.
#
# Versions  torch 2.13.0 (linear_cross_entropy is new in it)
# Guess     Its options choose in how many pieces the logits are made. Under autocast the loss is float32 either way, as
#           cross_entropy's is: its log-softmax is on autocast's list of what runs in float32.
# Instead   Without options it is. With LinearCrossEntropyOptions() and hidden rows in bfloat16, as an autocast model hands them on,
#           the loss comes in bfloat16: of numbers near 10 it knows steps of 1/16. Its gradients are as good as before. With hidden
#           rows in float32 the same options do the opposite: autocast's low precision is not used at all, and the gradients are
#           exact to 1e-6. No warning in either case.
# Seen      Reference 10.5421; bfloat16 rows: 10.5422 float32 without options, 10.4375 bfloat16 with them; float32 rows: gradient
#           off by 7.6e-3 without, by 1e-6 with.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > loss.py <<'PYTHON'
import warnings

import torch
import torch.nn.functional as F
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

warnings.simplefilter("error")
torch.manual_seed(0)
hidden, head = torch.randn(256, 64), torch.randn(2000, 64) * 0.3
targets = torch.randint(0, 2000, (256,))


def measure(options, dtype):
    """Return the loss under autocast, its type, and how far the gradient of the hidden rows is off."""
    rows, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.linear_cross_entropy(rows.to(dtype), weight, targets, options=options)
    loss.backward()
    return loss, (rows.grad - wanted).abs().max().item() / wanted.abs().max().item()


rows = hidden.clone().requires_grad_()
reference = F.cross_entropy(rows @ head.T, targets)
(wanted,) = torch.autograd.grad(reference, rows)
print(f"reference: {reference:.4f}")
found = {}
for options in (None, LinearCrossEntropyOptions()):
    for dtype in (torch.bfloat16, torch.float32):
        name = f"{'chunked' if options else 'whole'}, rows of {dtype}"
        found[name] = measure(options, dtype)
        loss, error = found[name]
        print(f"{name}: {loss.item():.4f} in {loss.dtype}, gradient off by {error:.1e}")
assert found["whole, rows of torch.bfloat16"][0].dtype == found["whole, rows of torch.float32"][0].dtype == torch.float32
assert found["chunked, rows of torch.bfloat16"][0].dtype == torch.bfloat16, "the loss keeps float32 now"
assert abs(found["chunked, rows of torch.bfloat16"][0].item() - reference.item()) > 0.05
assert found["whole, rows of torch.float32"][1] > 1e-3 > 1e-5 > found["chunked, rows of torch.float32"][1]
PYTHON
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
venv/bin/python loss.py
