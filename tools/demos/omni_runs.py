"""The curriculum of the omni demo as a run file; @ stands for the demo's folder."""

OMNI_RUN = """\
# Five stages in the manner of VITA: words, then pictures, clips and sounds, each aligned before it is learned together.
#   torchrun --nproc_per_node=2 -m trainer.main --cfg @/omni.toml

output_dir = "@/run"

[model.llm]
path = "@/llm"               # any Hugging Face causal language model
[data]
workers = 0                  # media this small are read faster than they are passed between processes
[batch]
global_batch_size = 32       # shared by the ranks
micro_batch_size = 16
[optim]
lr = 1e-3
warmup_steps = 10
[parallel]
strategy = "ddp"             # every rank holds all weights: faster where they fit
[checkpoint]
every = 1000                 # and at the end of every stage
[log]
every = 5

[[stage]]                    # 1. The language model learns to read: which digit is named among other words?
name = "text"
[stage.model.llm]
tune = "full"
[[stage.data.sources]]
path = "@/text_train.json"
[stage.train]
max_steps = 120

[[stage]]                    # 2. Pictures become words that it knows already. It stays as it is.
name = "align_vision"
[stage.model.llm]
tune = "frozen"
[stage.model.vision]
path = "@/vision"
tune = "full"                # an untrained tower has to learn, too; one from the hub would be frozen here
[stage.model.vision_projector]
tune = "full"
[[stage.data.sources]]
path = "@/image_train.json"
media_root = "@/media"
[stage.train]
max_steps = 250

[[stage]]                    # 3. Pictures and clips, everything learns; sentences again, so that none are forgotten.
name = "vision"
[stage.model.llm]
tune = "full"
[stage.model.vision]
path = "@/vision"
tune = "full"
[stage.model.vision_projector]
tune = "full"
[[stage.data.sources]]
path = "@/image_train.json"
media_root = "@/media"
[[stage.data.sources]]
path = "@/video_train.json"
media_root = "@/media"
[[stage.data.sources]]
path = "@/text_train.json"
weight = 0.2
[stage.optim]
lr = 5e-4
[stage.train]
max_steps = 250

[[stage]]                    # 4. Sounds become words that it knows already. All that sees and reads stays as it is.
name = "align_audio"
[stage.model.llm]
tune = "frozen"
[stage.model.vision]
path = "@/vision"
tune = "frozen"
[stage.model.vision_projector]
tune = "frozen"
[stage.model.audio]
path = "@/audio"
tune = "full"
window = "clip"              # every clip costs its own frames, not the encoder's whole window
[stage.model.audio_projector]
kind = "conv_mlp"            # 12.5 tokens per second
tune = "full"
[[stage.data.sources]]
path = "@/audio_train.json"
media_root = "@/media"
[[stage.data.sources]]       # a part that the run has must have something to read
path = "@/image_train.json"
media_root = "@/media"
weight = 0.02
[stage.train]
max_steps = 200

[[stage]]                    # 5. All together, and noise, to which the answer is that it was nothing.
name = "together"
[stage.model.llm]
tune = "full"
[stage.model.vision]
path = "@/vision"
tune = "frozen"
[stage.model.vision_projector]
tune = "full"
[stage.model.audio]
path = "@/audio"
tune = "full"
window = "clip"
[stage.model.audio_projector]
kind = "conv_mlp"
tune = "full"
[[stage.data.sources]]
path = "@/audio_train.json"
media_root = "@/media"
[[stage.data.sources]]
path = "@/noise_train.json"
media_root = "@/media"
[[stage.data.sources]]
path = "@/image_train.json"
media_root = "@/media"
[[stage.data.sources]]
path = "@/video_train.json"
media_root = "@/media"
[[stage.data.sources]]
path = "@/text_train.json"
weight = 0.2
[stage.optim]
lr = 5e-4
[stage.train]
max_steps = 150
"""
