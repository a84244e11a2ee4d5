"""The two questions of the digit demo and their run files; @ stands for the demo's folder."""

QUESTIONS = {"digit": "Which digit is this?", "parity": "Is this digit odd or even?"}

DIGIT_RUN = """\
# Run 1: an untrained model learns to answer "Which digit is this?". Every part is trained in full.
#   torchrun --nproc_per_node=2 -m trainer.main --cfg @/digit.toml

output_dir = "@/digit"

[model.llm]
path = "@/llm"               # any Hugging Face causal language model
tune = "full"
[model.vision]
path = "@/vision"            # CLIP or SigLIP
tune = "full"
[model.vision_projector]     # features of the tower become embeddings of the language model
tune = "full"

[data]
workers = 0                  # pictures this small are read faster than they are passed between processes
max_length = 512             # the positions that this language model has
[[data.sources]]
path = "@/digit_train.json"
media_root = "@/images"
[[data.validation]]
path = "@/digit_test.json"
media_root = "@/images"

[batch]
global_batch_size = 32       # shared by the ranks
micro_batch_size = 16
[optim]
lr = 1e-3
[train]
max_steps = 250
[parallel]
strategy = "fsdp"            # FSDP2: every rank holds a part of each weight

[checkpoint]
every = 125
[validation]
every = 50
[log]
every = 5
"""

PARITY_RUN = """\
# Run 2: from run 1, adapters (LoRA) learn "Is this digit odd or even?". The rest stays but for the projector.
#   torchrun --nproc_per_node=2 -m trainer.main --cfg @/parity.toml

output_dir = "@/parity"

[model]
init_from = "@/digit/final"  # weights of every part that run 1 trained
[model.llm]
path = "@/llm"
tune = "lora"
[model.vision]
path = "@/vision"
tune = "frozen"
[model.vision_projector]
tune = "full"

[lora]
rank = 8
alpha = 16
dropout = 0.0

[data]
workers = 0
max_length = 512
[[data.sources]]
path = "@/parity_train.json"
media_root = "@/images"
[[data.validation]]
path = "@/parity_test.json"
media_root = "@/images"

[batch]
global_batch_size = 32
micro_batch_size = 16
[optim]
lr = 1e-3
[train]
max_steps = 200
[parallel]
strategy = "ddp"             # every rank holds all weights: faster where they fit

[checkpoint]
every = 100
[validation]
every = 50
[log]
every = 5
"""
