#!/usr/bin/env bash
# Of several videos in one prompt, SmolVLM's processor says of each that it has as many frames as the longest.
#
# Versions  transformers 5.23.0, torch 2.13.0, torchvision 0.28.0, num2words 0.5.14
# Guess     The sentence in front of a video, "You are provided the following series of three frames from a 0:00:03 video", counts
#           the frames that follow it, each with its time: the number is written for the model to read.
# Instead   The number is taken from the tensor of all videos of the call, after shorter ones were filled up with black frames. The
#           times and places of frames are those of the video itself, so the text contradicts itself, and the same video in the same
#           place is described differently beside a longer one. Nothing is warned of.
# Seen      A film of 3 s and one of 8 s, one frame a second. Alone: "three" before 3 frames, "eight" before 8. Together: "eight"
#           before 3 frames, "eight" before 8.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > intro.py <<'PYTHON'
import re

import numpy as np
import torch

if "+cpu" in torch.__version__:
    # The index's wheel of torchvision is built for another torch and loads no operators; none is used here, but two are looked up.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

SPECIAL = ("<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<end_of_utterance>")
tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
processor = SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(num_frames=8, fps=1), image_seq_len=1)


def film(seconds):
    """Return a film of 10 frames a second, and what its file says of it."""
    count = 10 * seconds
    frames = np.full((count, 3, 32, 32), 128, dtype=np.uint8)
    return frames, {"fps": 10.0, "duration": float(seconds), "total_num_frames": count, "frames_indices": None}


def intros(*lengths):
    """Return of every video of one prompt the number of frames in words and how many frames follow."""
    films = [film(seconds) for seconds in lengths]
    inputs = processor(
        text=["<video>" * len(films)], videos=[[frames for frames, _ in films]], video_metadata=[[about for _, about in films]],
        do_sample_frames=True, return_tensors="pt",
    )
    text = tokenizer.decode(inputs["input_ids"][0])
    parts = text.split("You are provided")[1:]
    return [(re.search(r"series of (\w+) frame", part).group(1), part.count("Frame from")) for part in parts]


alone, together = intros(3) + intros(8), intros(3, 8)
print("alone:", alone)
print("together:", together)
assert alone == [("three", 3), ("eight", 8)]
assert together == [("eight", 3), ("eight", 8)], "each video is counted by itself now"
PYTHON
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torchvision==0.28.0 numpy pillow transformers==5.23.0 num2words==0.5.14
venv/bin/python intro.py 2> /dev/null
