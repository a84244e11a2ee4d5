"""VITA's sound encoder as the folder that it is published in, tiny and random, with VITA's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MELS, WIDTH, HEADS, BLOCKS, INNER = 16, 24, 4, 2, 40
SETTINGS = """\
cmvn_file: exp/global_cmvn
dataset_conf:
  fbank_conf:
    dither: {dither}
    frame_length: 25
    frame_shift: 10
    num_mel_bins: {mels}
  resample_conf:
    resample_rate: 16000
encoder_conf:
  overview_conf:
    encoder-input-dim: {mels}
    encoder-layer-config: subsampling-transformer
    encoder-output-dim: {width}
  para_conf:
    subsampling:
      subsampling-dropout-rate: 0.1
      subsampling-input-dim: {mels}
      subsampling-output-dim: {width}
      subsampling-rate: 4
    transformer:
      transformer-attention-dim: {width}
      transformer-attention-dropout-rate: 0.0
      transformer-attention-heads: {heads}
      transformer-chunk_size: {chunk}
      transformer-concat-after: false
      transformer-dropout-rate: 0.1
      transformer-dynamic-chunks: false
      transformer-input-dim: {width}
      transformer-input-layer: linear
      transformer-left_chunks: {left}
      transformer-linear-units: {inner}
      transformer-normalize-before: true
      transformer-num-blocks: {blocks}
      transformer-output-dim: {width}
      transformer-pos-enc-class: rel-enc
      transformer-positional-dropout-rate: 0.1
      transformer-positionwise-layer-type: linear
input_dim: {mels}
is_json_cmvn: {json}
model_conf:
  activation_func: gelu
  adpter_type: subsampling
  chat_template: "<|im_start|>system\\nYou are heard.<|im_end|>\\n\\
    \\ kernel_size: 9\\n"
  enc_out_dim: {width}
  kernel_size: 5
  llm_embed_dim: {llm}
  llm_path: somewhere
  norm: layer
"""


def save_whale(folder: Path, llm: int = 48, chunk: int = -1, left: int = -1, **changes: Any) -> dict[str, Tensor]:
    """Write train.yaml, global_cmvn and final.pt; return the tensors of final.pt. `changes`: values of SETTINGS."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"mels": MELS, "width": WIDTH, "heads": HEADS, "inner": INNER, "blocks": BLOCKS, "llm": llm}
    text = SETTINGS.format(**{**sizes, "chunk": chunk, "left": left, "dither": 1.0, "json": "false", **changes})
    (folder / "train.yaml").write_text(text)
    (folder / "global_cmvn").write_text(kaldi_statistics())
    tensors = whale_tensors(llm)
    torch.save(tensors, folder / "final.pt")
    return tensors


def kaldi_statistics(frames: int = 50) -> str:
    """Sums and sums of squares of `frames` frames, as Kaldi's text form has them."""
    means, variances = statistics()
    sums = " ".join(str(frames * mean) for mean in means)
    squares = " ".join(str(frames * (variance + mean * mean)) for mean, variance in zip(means, variances))
    return f" [\n  {sums} {frames} \n  {squares} 0 ]\n"


def statistics() -> tuple[list[float], list[float]]:
    """Means and variances of the bands."""
    return [10.0 + 0.25 * band for band in range(MELS)], [4.0 + 0.5 * band for band in range(MELS)]


def whale_tensors(llm: int = 48) -> dict[str, Tensor]:
    """The encoder's and the adapter's tensors under VITA's names, random, so that norms and biases matter too."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    bands = ((MELS - 1) // 2 - 1) // 2
    for number, channels in ((0, 1), (2, WIDTH)):
        shapes[f"encoder.enc.0.core.conv.{number}.weight"] = (WIDTH, channels, 3, 3)
        shapes[f"encoder.enc.0.core.conv.{number}.bias"] = (WIDTH,)
    linear("encoder.enc.0.core.out.0", WIDTH, WIDTH * bands)
    linear("encoder.enc.1.embed.0", WIDTH, WIDTH)
    norm("encoder.enc.1.embed.1", WIDTH)
    for block in range(BLOCKS):
        here = f"encoder.enc.1.encoders.{block}"
        for letter in ("q", "k", "v", "out"):
            linear(f"{here}.self_attn.linear_{letter}", WIDTH, WIDTH)
        linear(f"{here}.self_attn.linear_pos", WIDTH, WIDTH, bias=False)
        shapes[f"{here}.self_attn.pos_bias_u"] = shapes[f"{here}.self_attn.pos_bias_v"] = (HEADS, WIDTH // HEADS)
        linear(f"{here}.feed_forward.w_1", INNER, WIDTH)
        linear(f"{here}.feed_forward.w_2", WIDTH, INNER)
        norm(f"{here}.norm1", WIDTH)
        norm(f"{here}.norm2", WIDTH)
    norm("encoder.enc.1.after_norm", WIDTH)
    shapes["adpter.conv1d2.weight"], shapes["adpter.conv1d2.bias"] = (2 * WIDTH, WIDTH, 5), (2 * WIDTH,)
    norm("adpter.bn2", 2 * WIDTH)
    linear("adpter.project", llm, 2 * WIDTH)
    generator = torch.Generator().manual_seed(11)
    found = {name: torch.randn(shape, generator=generator) * max(shape[-1], 9) ** -0.5 for name, shape in shapes.items()}
    for name, tensor in found.items():
        if name.endswith("weight") and tensor.dim() == 1:
            tensor += 1
    means, variances = statistics()
    found["encoder.global_cmvn.mean"] = torch.tensor(means)
    found["encoder.global_cmvn.istd"] = torch.tensor([variance**-0.5 for variance in variances])
    return found
