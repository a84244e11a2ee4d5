#!/usr/bin/env bash
# A processor whose video part is optional cannot be made without torchvision, not even with video_processor=None.
#
# Versions  transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.4.6, pillow 12.3.0; no torchvision
# Guess     InternVLProcessor's signature says `video_processor=None`. Who has pictures only leaves it out, and pictures are read by
#           the Pillow back end, which needs no torchvision. LLaVA's processor, made in the same way, works.
# Instead   The check of the arguments' types looks up the class of the video processor by name even where the argument is None.
#           Without torchvision that table is a stand-in object, and the look-up fails with an error about an attribute of the table.
# Seen      LlavaProcessor   made
#           InternVLProcessor AttributeError: type object 'VIDEO_PROCESSOR_MAPPING' has no attribute '_extra_content'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 torch==2.13.0 numpy==2.4.6 pillow==12.3.0

cd "$work"
venv/bin/python - <<'PYTHON'
import importlib.util
import inspect

from tokenizers import Tokenizer, models
from transformers import InternVLProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

assert importlib.util.find_spec("torchvision") is None
assert inspect.signature(InternVLProcessor.__init__).parameters["video_processor"].default is None

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
for number, name in enumerate(("start_image_token", "end_image_token", "context_image_token", "video_token")):
    setattr(tokenizer, name, f"<{number}>")
    setattr(tokenizer, f"{name}_id", number)

tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
LlavaProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer)
print("LlavaProcessor    made")
try:
    InternVLProcessor(image_processor=GotOcr2ImageProcessorPil(), tokenizer=tokenizer, video_processor=None)
except AttributeError as error:
    print("InternVLProcessor AttributeError:", error)
    assert str(error) == "type object 'VIDEO_PROCESSOR_MAPPING' has no attribute '_extra_content'"
else:
    raise AssertionError("the processor was made")
PYTHON
