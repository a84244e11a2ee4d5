#!/usr/bin/env bash
# Text that follows a video of more pairs of frames than rows or columns gets positions that lie inside that video.
#
# Versions  transformers 5.23.0 and 4.57.1, torch 2.13.0
# Guess     Qwen2-VL's positions of three axes are those its weights were trained with: what follows a picture or video begins one
#           behind the largest position so far, whichever axis it is on. 4.57.1 does so.
# Instead   5.23.0 goes on behind the larger of rows and columns and forgets the axis of time. After 16 pairs of frames of 2 x 2
#           tokens the question takes positions 3 and 4, which frames have as their times, while the last frame has 16. The model's
#           own offset for the answer (rope_deltas) still counts the time axis: its first token is at 17, and the twelve positions
#           from 5 on are skipped. Nothing is raised, and for pictures both versions agree.
# Seen      4.57.1: question at [17, 18], answer from 19; 5.23.0: question at [3, 4], answer from 17.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > positions.py <<'PYTHON'
import inspect
import sys

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

START, END, IMAGE, VIDEO, WORD = 1, 2, 3, 4, 5
config = Qwen2VLConfig(
    text_config={
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "bos_token_id": 0, "eos_token_id": 0,
    },
    vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    vision_start_token_id=START, vision_end_token_id=END, image_token_id=IMAGE, video_token_id=VIDEO,
)
model = Qwen2VLForConditionalGeneration(config).model


def last_positions(token, grid):
    """Return the positions of two words behind a picture or video of this grid of patches, and that of the answer."""
    times, high, wide = grid
    ids = torch.tensor([[START, *[token] * (times * high * wide // 4), WORD, WORD]])
    kind = "image" if token == IMAGE else "video"
    given = {f"{kind}_grid_thw": torch.tensor([grid])}
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
        given["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    positions, delta = model.get_rope_index(ids, **given)
    words = positions[:, 0, -2:]
    assert (words == words[0]).all()
    return words[0].tolist(), int(delta) + ids.shape[1]


picture, video = last_positions(IMAGE, (1, 4, 4)), last_positions(VIDEO, (16, 4, 4))
print(f"behind a picture of 2 x 2 tokens: question at {picture[0]}, answer from {picture[1]}")
print(f"behind a video of 16 x 2 x 2 tokens: question at {video[0]}, answer from {video[1]}")
assert picture == ([3, 4], 5)
assert video == (([17, 18], 19) if sys.argv[1] == "trained" else ([3, 4], 17)), "the positions have changed"
PYTHON
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
for version in 4.57.1 5.23.0; do
    venv/bin/pip install --quiet "transformers==$version"
    echo "transformers $version"
    venv/bin/python positions.py "$([ "$version" = 4.57.1 ] && echo trained || echo now)" 2> /dev/null
done
