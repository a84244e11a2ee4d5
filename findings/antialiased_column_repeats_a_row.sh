#!/usr/bin/env bash
# An antialiased resize to a width of one pixel repeats its first row down the whole column, on the CPU.
#
# Versions  torch 2.13.0, transformers 5.23.0
# Guess     interpolate(x, (9, 1), antialias=True) is the transpose of interpolate(x.mT, (1, 9), antialias=True).
# Instead   Every row of the column equals the first one, for bilinear and bicubic, float32 and float64; a width of two is right,
#           and so is the same tensor in channels_last. SigLIP2's tower of variable size resizes its position table so: in a picture
#           one patch wide and nine high all nine patches get the position of the uppermost, and it sees them without order.
# Seen      the nine rows of the column differ by 0.0, those of the transposed resize by 1.0; with width two both agree to
#           rounding. Siglip2VisionEmbeddings gives nine equal patches nine equal positions.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy

"$work/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import interpolate
from transformers import Siglip2VisionConfig, Siglip2VisionModel

torch.manual_seed(0)
table = torch.randn(1, 4, 5, 5)


def both(size, mode, of):
    """Return the resized table, and the transpose of the transposed table's."""
    height, width = size
    options = {"mode": mode, "antialias": True}
    return interpolate(of, (height, width), **options), interpolate(of.mT.contiguous(), (width, height), **options).mT


for mode in ("bilinear", "bicubic"):
    for dtype in (torch.float32, torch.float64):
        column, expected = both((9, 1), mode, table.to(dtype))
        spread = [(x - x[:, :, :1]).abs().max().item() for x in (column, expected)]
        print(f"{mode} {dtype}: rows of the column differ by {spread[0]:.1f}, of the transposed one by {spread[1]:.1f}")
        assert spread[0] == 0 and spread[1] > 0.5, "the column has rows of its own now"
    two, expected = both((9, 2), mode, table)
    assert torch.allclose(two, expected, atol=1e-5)
last = interpolate(table.contiguous(memory_format=torch.channels_last), (9, 1), mode="bilinear", antialias=True)
assert torch.allclose(last, both((9, 1), "bilinear", table)[1], atol=1e-5)

config = Siglip2VisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=2, num_patches=25)
embeddings = Siglip2VisionModel(config).embeddings
patches, shape = torch.ones(1, 9, 12), torch.tensor([[9, 1]])
found = embeddings(patches, shape)[0]
print(f"SigLIP2: embeddings of nine equal patches in a column differ by {(found - found[0]).abs().max().item():.1f}")
assert torch.equal(found, found[:1].expand_as(found)), "SigLIP2 gives each patch its own position now"
PYTHON
