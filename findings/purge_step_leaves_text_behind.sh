#!/usr/bin/env bash
# A resumed TensorBoard log purges the scalars that the first start wrote too far, and keeps its texts: a step has two.
#
# Versions  torch 2.13.0 (CPU), tensorboard 2.21.0
# Guess     SummaryWriter(purge_step=5), which a resumed run passes, takes back everything of step 5 and later: readers then show
#           what the second start wrote, of whatever kind.
# Instead   TensorBoard's own EventAccumulator drops scalars and pictures of the steps that are run again. add_text writes tensors,
#           and tensors are not in the list of kinds that it filters, so a table of step 6 stands there twice, the old one first.
# Seen      steps 3 and 6, then again from step 5: scalars [3, 6], pictures [3, 6], texts [3, 6, 6].
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 tensorboard==2.21.0 pillow

cd "$work"
venv/bin/python - <<'PYTHON'
import time

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def start(steps, purge_step):
    """Log a scalar, a picture and a text at each of some steps, as one start of a run."""
    with SummaryWriter("log", purge_step=purge_step) as writer:
        for step in steps:
            writer.add_scalar("loss", purge_step + step, step)
            writer.add_image("picture", np.zeros((3, 2, 2), dtype=np.uint8), step)
            writer.add_text("answer", f"of the start at {purge_step}", step)


start([3, 6], 0)
time.sleep(1.1)  # a file is named by its second, and read in that order
start([6], 5)
found = EventAccumulator("log", size_guidance={"tensors": 0, "images": 0, "scalars": 0}).Reload()
steps = [[event.step for event in read] for read in (found.Scalars("loss"), found.Images("picture"), found.Tensors("answer/text_summary"))]
print(f"scalars {steps[0]}, pictures {steps[1]}, texts {steps[2]}")
assert steps[:2] == [[3, 6], [3, 6]], "scalars and pictures are not purged any more"
assert steps[2] == [3, 6, 6], "texts are purged as well now"
PYTHON
