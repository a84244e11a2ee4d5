"""Merge a run's adapters into their weights: SOURCE, a final/ folder or checkpoint-N, becomes OUT, a final/ without adapters.

W + scale * B A is computed in float32 and rounded to the run's dtype once. Where W was stored in 4 or 8 bits, W is the
dequantised matrix: the adapter was trained beside that matrix, and makes up for its errors. Logits are compared before OUT appears.

OUT is a folder of this trainer (model.json, llm.safetensors ...): for tools.chat, for load_model, and as model.init_from of a next
run. It is no Hugging Face folder: tools.export_adapter SOURCE OUT --for llm writes the merged language model as one, --for hf the
whole model. Both take SOURCE or OUT.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # started as a file, its own folder is on the path and not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from data.processor import Processor, load_processor
from model.card import ModelCard, read_card, write_card
from model.config import ModelConfig, QuantizeConfig
from model.errors import ConfigError
from model.exports.trained_files import changed_parts, projector, write_file
from model.files.proof import proof_entry
from model.files.tensor_files import Entry, dump_json, in_memory, tensor_digests, write_safetensors
from model.load import load_model
from model.multimodal import MultimodalLM
from tools.cli import command_parser, run_command
from tools.exports.output_folder import listing, new_folder
from tools.exports.proofs import batch_of, check_close, logits, sample
from trainer.checkpoint.final_files import split_files
from trainer.errors import ProofError


def merge(source: Path, out: Path) -> None:
    """Write `out` and print what it holds. Raises ConfigError when there is nothing to merge, ProofError when logits differ."""
    card = read_card(source)
    if not card.lora_parts:
        raise ConfigError(f"{source} has no adapters: no part of it has tune = 'lora'; it can be used as it is")
    processor = load_processor(source)
    with new_folder(out) as folder:
        difference = prove_merge(source, processor)
        write_merged(source, folder, card, processor)
        rounding = rounding_of(source, folder, processor)
    print(f"float32 logits: merged and unmerged within {difference:.1e} of the largest")
    print(f"weights are stored in {read_card(out).model.dtype}: rounding them moves logits by {rounding:.1e}")
    place = shlex.quote(str(out))
    print(f"{out}:\n{listing(out)}\nnext: python -m tools.chat {place}")
    print(
        f"{out} is a folder of this trainer, and no Hugging Face folder: for one, python -m tools.export_adapter {place} HF_OUT "
        "--for hf (the whole model) or --for llm (the language model)"
    )


def prove_merge(source: Path, processor: Processor) -> float:
    """Return the largest relative difference of float32 logits with the adapters merged and beside their weights.

    Raises ProofError when it is more than rounding.
    """
    unmerged, merged = (logits_of(source, processor, merge_lora) for merge_lora in (False, True))
    return check_close(merged, unmerged, "merged and unmerged model")


def logits_of(folder: Path, processor: Processor, merge_lora: bool) -> Tensor:
    with sample(processor) as record:
        # Load one model at a time: two in float32 may not fit into memory.
        return logits(load_model(folder, dtype=torch.float32, merge_lora=merge_lora), batch_of(processor, record))


def write_merged(source: Path, folder: Path, card: ModelCard, processor: Processor) -> None:
    """Write every part that differs from its base, whole, and the rest of a final/ folder. The written weights are read back."""
    model = load_model(source)
    parts = changed_parts(source, card)
    for part in sorted(parts - {"vision_projector"}):
        write_merged_part(folder, part, model)
    if card.model.vision_projector is not None and (tensors := projector(source, card)):
        write_file(folder / "vision_projector.safetensors", tensors)
    dtype = str(model.dtype).removeprefix("torch.")
    alone = replace(standalone(card.model, parts), dtype=dtype)  # type: ignore[arg-type]
    write_card(replace(card, model=alone, quantize=QuantizeConfig()), folder)
    processor.save(folder)
    write_proof(folder, "float32 logits of a sample, merged and unmerged; every tensor's bytes after reopening")


def write_proof(folder: Path, compared: str) -> None:
    """Write proof.json of the weight files in `folder`; `compared`: in words."""
    files = {path.name: proof_entry(path) for path in sorted(folder.glob("*.safetensors"))}
    (folder / "proof.json").write_text(dump_json({"files": files, "compared": compared}))


def write_merged_part(folder: Path, part: str, model: MultimodalLM) -> None:
    """Write every parameter of a part of `model`. Raises `ProofError` where what is read back is not what was written."""
    named = model.get_submodule(part).named_parameters()
    entries = {name: Entry(model.dtype, tuple(p.shape), in_memory(p.detach()).all) for name, p in named}
    for name, group in split_files(part, entries):
        with (folder / name).open("wb") as out:
            written = write_safetensors(out, group)
        if dict(tensor_digests(folder / name)) != written:
            raise ProofError(f"{folder / name}: what was read back is not what was written")


def standalone(config: ModelConfig, parts: set[str]) -> ModelConfig:
    """Return the configuration of a model whose `parts` stand in its own folder: nothing of an earlier run is needed."""
    llm = replace(config.llm, tune="full" if "llm" in parts else config.llm.tune)
    vision, projector = config.vision, config.vision_projector
    if vision is not None and "vision" in parts:
        vision = replace(vision, tune="full")
    if projector is not None:
        projector = replace(projector, path="")
    return replace(config, llm=llm, vision=vision, vision_projector=projector, init_from="")


def rounding_of(source: Path, folder: Path, processor: Processor) -> float:
    """Return how far the logits of the written model are from the unmerged model's, relative to the largest logit."""
    written, exact = logits_of(folder, processor, True), logits_of(source, processor, False)
    return float((written - exact).abs().max() / exact.abs().max())


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("merge_lora", __doc__)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a final/ folder or a checkpoint-N with adapters")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    given = parser.parse_args(arguments)
    return run_command("merge_lora", lambda: merge(given.source, given.out))


if __name__ == "__main__":
    raise SystemExit(main())
