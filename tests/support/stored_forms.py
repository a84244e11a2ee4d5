"""Forms in which bases, towers and encoders are stored: what makes each out of a plain folder, and what must come of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Named = dict[str, Tensor]
EQUAL = "equal to transformers"
MATRIX = "model.layers.0.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 16], "activation_scheme": "dynamic"}


@dataclass(frozen=True)
class Form:
    """One stored form of a part."""

    part: str  # llm | llm_tied | gpt2 | mixture | corrected | clip | siglip | dinov2 | whisper: the plain folder it is made of
    name: str
    expected: str  # EQUAL, or words of the refusal
    make: Callable[[Path], object] = lambda folder: None
    settings: dict[str, Any] = field(default_factory=dict)  # of [model.llm]

    @property
    def row(self) -> str:
        """The form's line of the table."""
        told = self.expected if self.expected == EQUAL else f"refused: “{self.expected}”"
        asked = "".join(f" (`{key} = {str(value).lower()}`)" for key, value in self.settings.items())
        return f"| {PARTS[self.part]} | {self.name}{asked} | {told} |"


PARTS = {
    "llm": "language model",
    "llm_tied": "language model, head tied",
    "gpt2": "GPT-2",
    "mixture": "Mixtral",
    "corrected": "GLM-4-MoE",
    "neox": "GPT-NeoX",
    "granite": "Granite-MoE",
    "hybrid": "OLMo hybrid",
    "hashed": "DeepSeek-V4",
    "clip": "CLIP tower",
    "siglip": "SigLIP tower",
    "dinov2": "DINOv2 tower",
    "whisper": "Whisper encoder",
}


def read(folder: Path) -> Named:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: Named) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def changed(change: Callable[[Named], object]) -> Callable[[Path], None]:
    """Rewrites model.safetensors with its tensors changed in place."""

    def make(folder: Path) -> None:
        tensors = read(folder)
        change(tensors)
        write(folder, tensors)

    return make


def with_tensors(**added: Tensor) -> Callable[[Path], None]:
    return changed(lambda tensors: tensors.update({name.replace("__", "."): t for name, t in added.items()}))


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: write(folder, {rename(name): t for name, t in read(folder).items()})


def config(**changes: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return make


def both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for step in steps:
            step(folder)

    return make


def stored_as(dtype: torch.dtype, matrices_only: bool = False) -> Callable[[Path], None]:
    return lambda folder: write(
        folder, {n: t.to(dtype) if t.dim() > 1 or not matrices_only else t for n, t in read(folder).items()}
    )


def to_bin(folder: Path, **options: Any) -> None:
    torch.save(read(folder), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def to_shards(folder: Path, suffix: str = "safetensors", keep: bool = False) -> None:
    """Two shards and their index; `keep`: the single file stays beside them."""
    stem, tensors = "model" if suffix == "safetensors" else "pytorch_model", sorted(read(folder).items())
    places = {}
    for k in range(2):
        file, part = f"{stem}-{k + 1:05d}-of-00002.{suffix}", dict(tensors[k::2])
        save_file(part, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if not keep:
        (folder / "model.safetensors").unlink()


SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def twice(folder: Path) -> None:
    to_shards(folder)
    first = load_file(folder / SECOND.replace("00002-of", "00001-of"))
    save_file({**load_file(folder / SECOND), **dict(list(first.items())[:1])}, folder / SECOND, {"format": "pt"})


def lost(folder: Path) -> None:
    to_shards(folder)
    tensors = load_file(folder / SECOND)
    save_file(dict(list(tensors.items())[1:]), folder / SECOND, {"format": "pt"})


def headless(folder: Path) -> None:
    """As AutoModel.save_pretrained writes the decoder."""
    write(folder, {n.removeprefix("model."): t for n, t in read(folder).items() if n != HEAD})


def coded(dtype: torch.dtype, ends: dict[str, Callable[[Tensor], Tensor]], weight: str = ".weight") -> Callable[[Path], None]:
    """Every matrix of a block as codes of `dtype`, with other tensors whose names end otherwise beside it."""

    def change(tensors: Named) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            value, path = tensors.pop(name), name.removesuffix(".weight")
            tensors[path + weight] = (value * 100).round().clamp(-127, 127).abs().to(dtype)
            tensors.update({path + end: make(value) for end, make in ends.items()})

    return changed(change)


def ones(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: torch.ones(shape)


def rows(weight: Tensor) -> Tensor:
    return weight.abs().amax(1, keepdim=True)


def fp8(block: tuple[int, int] | None, exponents: bool = False) -> Callable[[Path], None]:
    """FP8 with a scale per block, or per matrix; `exponents`: scales are powers of two, stored as bytes (UE8M0)."""

    def change(tensors: Named) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            value = tensors[name]
            height, width = block or value.shape
            grid = value.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
            scale = grid.abs().amax((2, 3)) / 448
            scale = scale.log2().ceil().exp2() if exponents else scale
            codes = (grid / scale[..., None, None]).transpose(1, 2).reshape(value.shape).to(torch.float8_e4m3fn)
            stored = (scale.log2() + 127).to(torch.uint8) if exponents else scale
            tensors |= {name: codes, f"{name}_scale_inv": stored if block else stored.reshape(())}
            if block is None:
                tensors[name.replace("weight", "activation_scale")] = torch.ones(())

    settings = {**FP8, "weight_block_size": block, **({"scale_fmt": "ue8m0"} if exponents else {})}
    return both(changed(change), config(quantization_config={**settings, "activation_scheme": "dynamic" if block else "static"}))


def quantised(name: str, **settings: Any) -> Callable[[Path], None]:
    return config(quantization_config={"quant_method": name, **settings})


def inside_llava(folder: Path) -> None:
    """The tower as it stands in a LLaVA folder, with tensors of the language model and the projector."""
    tensors = {f"vision_tower.vision_model.{name.removeprefix('vision_model.')}": t for name, t in read(folder).items()}
    tensors |= {"language_model.model.norm.weight": torch.ones(2), "multi_modal_projector.linear_1.weight": torch.ones(2, 2)}
    write(folder, tensors)
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": own}))


def copied_below(prefix: str) -> Callable[[Path], None]:
    return changed(
        lambda tensors: tensors.update({prefix + n.removeprefix("model.encoder."): t + 1 for n, t in list(tensors.items())})
    )


def variant(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def inside_later_llava(folder: Path) -> None:
    """As `inside_llava`, under the names that transformers has in memory, which save_original_format = False writes."""
    inside_llava(folder)
    renamed(lambda name: f"model.{name}")(folder)


NEXT = {"model__layers__2__mlp__up_proj__weight": torch.ones(48, 32)}
CLIP_BLOCK = "encoder.layers.{}.mlp.fc1.weight"
LLM_FORMS = [
    Form("llm", "one file, float32", EQUAL),
    Form("llm", "float64", EQUAL, stored_as(torch.float64)),
    Form("llm", "float16", EQUAL, stored_as(torch.float16)),
    Form("llm", "bfloat16", EQUAL, stored_as(torch.bfloat16)),
    Form("llm", "matrices in bfloat16, vectors in float32", EQUAL, stored_as(torch.bfloat16, matrices_only=True)),
    Form("llm", "shards with an index", EQUAL, to_shards),
    Form("llm", "pytorch_model.bin", EQUAL, to_bin),
    Form("llm", "pytorch_model.bin from before PyTorch 1.6", EQUAL, lambda f: to_bin(f, _use_new_zipfile_serialization=False)),
    Form("llm", "pytorch_model.bin in shards", EQUAL, lambda f: to_shards(f, "bin")),
    Form(
        "llm",
        "other weights in pytorch_model.bin beside model.safetensors",
        EQUAL,
        lambda f: torch.save({n: t + 1 for n, t in read(f).items()}, f / "pytorch_model.bin"),
    ),
    Form(
        "llm",
        "consolidated.safetensors beside it",
        EQUAL,
        lambda f: save_file({"x": torch.ones(1)}, f / "consolidated.safetensors"),
    ),
    Form(
        "llm",
        "rotary_emb.inv_freq of every layer",
        EQUAL,
        with_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    ),
    Form("llm", "fewer tokens in the tokenizer than rows", EQUAL),
    Form("llm_tied", "no head in the file", EQUAL),
    Form("llm_tied", "a head equal to the embedding", EQUAL, changed(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))),
    Form("llm_tied", "names without `model.` (AutoModel)", EQUAL, headless),
    Form("gpt2", "as published: no prefix, causal masks among the weights", EQUAL),
    Form("neox", "as published: the head is `embed_out`, which transformers renames", EQUAL),
    Form("granite", "experts fused, under names that transformers renames", EQUAL),
    Form("mixture", "experts one by one", EQUAL),
    Form("corrected", "a router's corrections, which are buffers", EQUAL),
    Form(
        "corrected",
        "a layer that transformers' class ignores (next-token prediction)",
        EQUAL,
        with_tensors(model__layers__46__eh_proj__weight=torch.ones(2, 2)),
    ),
    Form("hashed", "a router's experts by token, integers (eager attention)", EQUAL),
    Form("llm", "FP8, a scale per block", EQUAL, fp8((8, 16)), {"dequantize": True}),
    Form("llm", "FP8, a scale per matrix", EQUAL, fp8(None), {"dequantize": True}),
    Form("llm", "FP8, scales in bytes (UE8M0)", EQUAL, fp8((16, 16), exponents=True), {"dequantize": True}),
    Form("corrected", "FP8, a scale per block, experts one by one", EQUAL, fp8((8, 16)), {"dequantize": True}),
    Form("llm", "FP8, a scale per block", "is stored quantised (fp8, e4m3)", fp8((8, 16))),
    Form("llm", "FP8 without quantization_config", "float8_e4m3fn", both(fp8((8, 16)), config(quantization_config=None))),
    Form(
        "llm",
        "FP8, one scale missing",
        "without a model.layers.0.mlp.up_proj.weight_scale_inv",
        both(fp8((8, 16)), changed(lambda t: t.pop(f"{MATRIX}_scale_inv"))),
        {"dequantize": True},
    ),
    Form(
        "llm",
        "FP8, scales of another shape",
        "does not divide",
        both(fp8((8, 16)), changed(lambda t: t.update({f"{MATRIX}_scale_inv": torch.ones(2, 2)}))),
        {"dequantize": True},
    ),
    Form(
        "llm",
        "W8A8",
        "compressed-tensors, int-quantized",
        both(coded(torch.int8, {".weight_scale": rows}), quantised("compressed-tensors", format="int-quantized")),
    ),
    Form(
        "llm",
        "bitsandbytes, 8 bits",
        "bitsandbytes, 8 bits",
        both(coded(torch.int8, {".SCB": lambda w: w.abs().amax(1)}), config(quantization_config={"load_in_8bit": True})),
    ),
    Form(
        "llm",
        "bitsandbytes, 4 bits",
        "bitsandbytes, 4 bits",
        coded(torch.uint8, {".weight.absmax": ones(4), ".weight.quant_map": ones(16)}),
    ),
    Form(
        "llm",
        "GPTQ",
        "gptq, 4 bits",
        both(coded(torch.int32, {".qzeros": ones(2, 2), ".g_idx": ones(4)}, ".qweight"), quantised("gptq", bits=4)),
    ),
    Form(
        "llm",
        "GPTQ without quantization_config",
        "(GPTQ)",
        coded(torch.int32, {".qzeros": ones(2, 2), ".g_idx": ones(4)}, ".qweight"),
    ),
    Form("llm", "AWQ", "awq, 4 bits", both(coded(torch.int32, {".qzeros": ones(2, 2)}, ".qweight"), quantised("awq", bits=4))),
    Form("llm", "MXFP4", "mxfp4", both(coded(torch.uint8, {"_scales": ones(2, 2)}, "_blocks"), quantised("mxfp4"))),
    Form("llm", "quantization_config beside plain weights", "remove quantization_config", quantised("torchao")),
    Form(
        "llm",
        "an int8 matrix, nothing said",
        "integers or 8-bit floats",
        changed(lambda t: t.update({MATRIX: t[MATRIX].to(torch.int8)})),
    ),
    Form("llm", "an integer tensor that no part has", "holds 1 tensor(s)", with_tensors(model__counts=torch.ones(3).long())),
    Form("llm", "plain weights", "has no effect", settings={"dequantize": True}),
    Form("llm", "GPTQ", "only quant_method 'fp8' is dequantised", quantised("gptq", bits=4), {"dequantize": True}),
    Form(
        "llm",
        "a single file beside shards with an index",
        "two sets of weights: model.safetensors.index.json, and model.safetensors",
        lambda f: to_shards(f, keep=True),
    ),
    Form(
        "llm",
        "a shard that no index names",
        f"model.safetensors, and {SECOND}",
        lambda f: shutil.copy(f / "model.safetensors", f / SECOND),
    ),
    Form("llm", "GGUF", "llama.cpp's format", lambda f: (f / "model.safetensors").rename(f / "model.gguf")),
    Form("llm", "shards without an index", "is a shard, and its index", both(to_shards, lambda f: (f / INDEX).unlink())),
    Form("llm", "a shard missing", f"{SECOND} is missing", both(to_shards, lambda f: (f / SECOND).unlink())),
    Form("llm", "a tensor that the index names missing", "says that model-00002-of-00002.safetensors holds", lost),
    Form("llm", "a tensor in two shards", "stands in two files", twice),
    Form("llm", "a file cut short", "is cut short", lambda f: os.truncate(f / "model.safetensors", 9_000)),
    Form("llm_tied", "a head of other values", "hold different values", changed(lambda t: t.update({HEAD: t[EMBEDDING] + 1}))),
    Form("llm", "names without `model.`, no head (AutoModel)", "was saved without its head", headless),
    Form("llm", "a layer more than config.json says", "config.json has 2 layers, the files go on to layer 2", with_tensors(**NEXT)),
    Form("hybrid", "kernels that transformers puts together while it loads", "save_original_format=False"),
    Form("llm", "names with a prefix", "its names begin with 'language_model.'", renamed(lambda name: f"language_model.{name}")),
    Form("llm", "an adapter in the same folder", "name it as lora.path", lambda f: (f / "adapter_config.json").write_text("{}")),
    Form("llm", "a file of another name", "model.fp16.safetensors is not read", variant),
    Form("llm", "a pointer of Git LFS", "git lfs pull", pointer),
    Form("llm", "a tensor of no layer", "v_head.weight", with_tensors(v_head__weight=torch.ones(1, 32))),
    Form(
        "llm",
        "a LoRA adapter among the weights",
        "merge it into the model first",
        with_tensors(model__layers__0__mlp__up_proj__lora_A__weight=torch.ones(2, 32)),
    ),
    Form(
        "llm",
        "a projector among the weights (LLaVA)",
        "model.vision_projector.path",
        with_tensors(model__mm_projector__0__weight=torch.ones(2, 2)),
    ),
    Form("llm", "a tensor missing", f"no value for llm.{MATRIX}", changed(lambda t: t.pop(MATRIX))),
    Form(
        "llm",
        "a matrix of another shape",
        "[3, 2] in the file, [48, 32] in the model",
        changed(lambda t: t.update({MATRIX: torch.ones(3, 2)})),
    ),
    Form(
        "llm",
        "more rows than vocab_size",
        "vocab_size = 310 in config.json, but model.embed_tokens.weight has 320 rows",
        config(vocab_size=310),
    ),
    Form(
        "llm",
        "fewer rows than vocab_size",
        "vocab_size = 330 in config.json, but model.embed_tokens.weight has 320 rows",
        config(vocab_size=330),
    ),
    Form(
        "mixture",
        "a piece of an expert missing",
        "lack 1 tensors of experts",
        changed(lambda t: t.pop("model.layers.0.block_sparse_moe.experts.1.w2.weight")),
    ),
    Form(
        "mixture",
        "a piece that no expert has",
        "w4.weight, which no expert of this model has",
        with_tensors(model__layers__0__block_sparse_moe__experts__1__w4__weight=torch.ones(2, 2)),
    ),
    Form(
        "corrected",
        "a router's corrections missing",
        "no value for llm.model.layers.1.mlp.gate.e_score_correction_bias",
        changed(lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias")),
    ),
    Form(
        "llm",
        "a CLIP tower's folder",
        "is no language model: 'clip_vision_model'",
        config(model_type="clip_vision_model", patch_size=8),
    ),
]
ENCODER_FORMS = [
    Form("clip", "the tower alone", EQUAL),
    Form(
        "clip",
        "the whole CLIP",
        EQUAL,
        both(
            renamed(lambda n: n if n.startswith("vision_model.") else f"vision_model.{n}"),
            with_tensors(
                text_model__final_layer_norm__weight=torch.ones(2),
                visual_projection__weight=torch.ones(2, 2),
                logit_scale=torch.ones(()),
            ),
        ),
    ),
    Form("clip", "inside a LLaVA folder", EQUAL, inside_llava),
    Form("clip", "inside a LLaVA folder, names in memory", EQUAL, inside_later_llava),
    Form("clip", "position_ids", EQUAL, with_tensors(embeddings__position_ids=torch.arange(5)[None])),
    Form("clip", "float16 in shards", EQUAL, both(stored_as(torch.float16), to_shards)),
    Form("clip", "pytorch_model.bin", EQUAL, to_bin),
    Form("siglip", "the tower with its pooling head", EQUAL),
    Form("dinov2", "the tower with its mask token and last norm", EQUAL),
    Form(
        "clip",
        "an int8 matrix",
        "int8",
        changed(lambda t: t.update({CLIP_BLOCK.format(0): t[CLIP_BLOCK.format(0)].to(torch.int8)})),
    ),
    Form("clip", "an integer tensor that no part has", "holds 1 tensor(s)", with_tensors(counts=torch.ones(3).long())),
    Form("clip", "quantization_config", "is stored quantised (awq)", quantised("awq")),
    Form("clip", "two towers under two prefixes", "hold two towers", copied_below("vision_tower.")),
    Form(
        "clip",
        "a block more than config.json says",
        "config.json has 3 layers, the files go on to layer 3",
        changed(lambda t: t.update({CLIP_BLOCK.format(3): t[CLIP_BLOCK.format(1)].clone()})),
    ),
    Form("clip", "a tensor of no block", "embeddings.extra", with_tensors(embeddings__extra=torch.ones(2))),
    Form(
        "clip",
        "a tensor missing",
        f"no value for vision.tower.{CLIP_BLOCK.format(0)}",
        changed(lambda t: t.pop(CLIP_BLOCK.format(0))),
    ),
    Form("whisper", "the whole Whisper", EQUAL),
    Form(
        "whisper",
        "the encoder alone",
        EQUAL,
        lambda f: write(f, {n.removeprefix("model.encoder."): t for n, t in read(f).items() if n.startswith("model.encoder.")}),
    ),
    Form(
        "whisper",
        "a layer more than config.json says",
        "config.json has 2 layers, the files go on to layer 2",
        with_tensors(model__encoder__layers__2__fc1__weight=torch.ones(40, 24)),
    ),
    Form(
        "whisper",
        "an int8 matrix",
        "int8",
        changed(lambda t: t.update({"model.encoder.layers.0.fc1.weight": t["model.encoder.layers.0.fc1.weight"].to(torch.int8)})),
    ),
    Form("whisper", "two encoders under two prefixes", "hold two encoders", copied_below("audio_tower.")),
]
