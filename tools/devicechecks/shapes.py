"""Shapes of models whose weights are made up: those of published ones, and small ones of their kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from model.files.untrusted import Json

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a language model of Qwen2's kind and of a tower of CLIP's."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    picture: int = 336  # pixels
    patch: int = 14

    def llm_config(self) -> Json:
        """Return config.json of the language model."""
        return {
            **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6},
            **{"hidden_size": self.width, "intermediate_size": self.inner, "num_hidden_layers": self.layers},
            **{"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary},
            **{"tie_word_embeddings": self.tied, "max_position_embeddings": 32768, "rope_theta": 1e6},
            **{"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "use_sliding_window": False},
        }

    def vision_config(self) -> Json:
        """Return config.json of the tower."""
        return {
            **{"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "projection_dim": 768},
            **{"hidden_size": self.vision_width, "intermediate_size": 4 * self.vision_width},
            **{"num_hidden_layers": self.vision_layers, "num_attention_heads": self.vision_heads},
            **{"image_size": self.picture, "patch_size": self.patch},
        }

    def write(self, folder: Path) -> Path:
        """Write the JSON files of both parts into folder/llm and folder/vision, without weights, and return the folder."""
        square = {"height": self.picture, "width": self.picture}
        processor = {
            **{"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255},
            **{"size": {"shortest_edge": self.picture}, "crop_size": square, "do_resize": True, "do_center_crop": True},
            **{"do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        }
        files = {
            "llm/config.json": self.llm_config(),
            "vision/config.json": self.vision_config(),
            "vision/preprocessor_config.json": processor,
        }
        for name, value in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(value))
        return folder


SMALL = ModelShape("small", 256, 512, 4, 4, 2, 2048, True, 128, 3, 4, 56, 14)
"""For checks that compare numbers: heads of 64, as the kernels of GPUs like them, 16 tokens a picture."""
TINY = ModelShape("tiny", 64, 128, 2, 4, 2, 320, True, 32, 3, 4, 32, 8)
"""The same on a CPU, in a second."""
HALF_B = ModelShape("0.5b", 896, 4864, 24, 14, 2, 151936, True)
ONE_AND_A_HALF_B = ModelShape("1.5b", 1536, 8960, 28, 12, 2, 151936, True)
SEVEN_B = ModelShape("7b", 3584, 18944, 28, 28, 4, 152064, False)
"""Qwen2's three smaller models, each with CLIP ViT-L/14 of 336 pixels: 576 tokens a picture."""
