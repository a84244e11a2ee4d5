#!/usr/bin/env bash
# In float16 a single row's cross entropy with label smoothing is infinite from about 7,000 classes on; its gradient is right.
#
# Versions  torch 2.13.0
# Guess     A loss near 10 fits float16 with room to spare, and a loss that overflows would have a gradient that is not finite:
#           a loss scaler that looks at gradients would notice.
# Instead   The smoothing term is the sum of the negative log-probabilities of all classes, divided by their number afterwards. In
#           float16 the sum passes 65,504 at vocabularies of language models, whatever the logits. Backward never sees the sum: its
#           gradients agree with float32, so training goes on and only the curve reads inf. The same smoothed distribution given as
#           class probabilities has a finite loss.
# Seen      2,000 classes: 8.56; 8,000 and 32,000: inf, as probabilities 9.66 and 10.73; gradients within 1e-4 of float32's.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > smoothing.py <<'PYTHON'
import math

import torch
import torch.nn.functional as F

torch.manual_seed(0)
target = torch.tensor([3])
for classes in (2000, 8000, 32000):
    half = torch.randn(1, classes).half().requires_grad_()
    full = half.detach().float().requires_grad_()
    loss, reference = (F.cross_entropy(logits, target, label_smoothing=0.1) for logits in (half, full))
    loss.backward()
    reference.backward()
    error = (half.grad.float() - full.grad).abs().max().item() / full.grad.abs().max().item()
    spelled = torch.full((1, classes), 0.1 / classes)
    spelled[0, 3] += 0.9
    given = F.cross_entropy(half.detach(), spelled.half()).item()
    print(f"{classes} classes: {loss.item():.2f}, float32 {reference.item():.2f}, as probabilities {given:.2f}, gradient {error:.0e}")
    assert math.isinf(loss.item()) == (classes > 2000), "the sum no longer overflows"
    assert abs(given - reference.item()) < 0.01 and error < 1e-4
PYTHON
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
venv/bin/python smoothing.py
