#!/usr/bin/env bash
# In towers of Idefics3 and SmolVLM patches of a full square share positions, for some numbers of patches a side.
#
# Versions  transformers 5.23.0, torch 2.13.0
# Guess     A square of as many patches as the tower has positions gets every position once: the fractions by which smaller pictures
#           find their place are then multiples of one patch.
# Instead   Fractions are compared with the borders between positions after both were rounded to float32, and a fraction that falls
#           on its border may be taken for the patch before. Of 2 to 64 patches a side, 17 numbers lose positions: with 19 a side, 37
#           of 361 are never read and as many patches stand on their neighbour's; with 50, 1,204 of 2,500. The published towers (26,
#           27 and 32 a side) are spared by luck. A tower that is trained anew, or resized to 50 x 50, never learns half its table.
# Seen      19: 37, 25: 264, 29: 165, 31: 232, 38: 75 ... 50: 1204 ... 62: 1140 positions unread; 0 at 26, 27 and 32.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy

"$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings


def unread(side):
    """Return how many positions no patch of a full square of side x side patches reads."""
    embeddings = Idefics3VisionEmbeddings(
        Idefics3VisionConfig(image_size=2 * side, patch_size=2, hidden_size=1, num_attention_heads=1)
    )
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
    whole = torch.ones(1, side, side, dtype=torch.bool)
    read = embeddings(torch.zeros(1, 3, 2 * side, 2 * side), whole).flatten().long().tolist()
    return side * side - len(set(read))


found = {side: unread(side) for side in range(2, 65)}
print(", ".join(f"{side}: {number}" for side, number in found.items() if number))
assert [found[side] for side in (19, 25, 50)] == [37, 264, 1204]
assert [found[side] for side in (26, 27, 32)] == [0, 0, 0]
assert sum(number > 0 for number in found.values()) == 17, "other squares lose positions now"
PYTHON
