"""What the forkserver of the ranks imports once, so that no rank imports it again: a third of what a tiny run costs otherwise.

Every rank imports the module that its function stands in, and with it all that a test module needs.
"""

import gc
import importlib

MODULES = (
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.tensor.experimental"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.clip.modeling_clip"),
    *("transformers.models.mixtral.modeling_mixtral", "transformers.models.qwen3_moe.modeling_qwen3_moe"),
    *("pytest", "hypothesis", "bitsandbytes", "tokenizers", "jinja2.debug"),
    *("trainer.main", "tests.support.runs", "tests.support.fuzz_targets", "tests.support.router", "tests.support.tiny_audio"),
)
for name in MODULES:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a rank's collections neither visit these objects nor copy their pages
