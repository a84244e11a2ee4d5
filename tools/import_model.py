"""Turn a published model into a final/ folder of ours: SOURCE, a folder or hub id, becomes OUT, with a run file to start from.

SOURCE is taken apart as `model.init_from = "SOURCE"` of a run does it. OUT holds every tensor, the tokenizer and the settings that
follow from the model; with --link it names SOURCE for the towers and the language model. Where transformers has a class for SOURCE,
float32 logits of a sample with a picture or a clip are compared before OUT appears.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started as a file, its own folder is on the path and not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from data.processor import Processor
from model.build import DTYPES, assemble
from model.card import ModelCard, base_digests, write_card
from model.errors import ConfigError
from model.files.hub import read_json
from model.load import check_loadable
from model.multimodal import MultimodalLM
from model.published.table import find_layout, part_config
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tools.cli import command_parser, run_command
from tools.exports.output_folder import listing, new_folder
from tools.exports.proofs import batch_of, in_float32, logits, sample
from tools.exports.reference import prove_against
from tools.merge_lora import write_merged_part, write_proof
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.records.run_data import open_vocabulary
from trainer.runfile.load import parse_config
from trainer.runfile.published import is_published, resolve_published
from trainer.runfile.toml_files import to_toml

SETTING = "SOURCE"
MAX_LENGTH = 4096
"""data.max_length of the run file: several thousand tokens for a picture in tiles and a conversation about it."""


def import_model(source: str, out: Path, *, link: bool = False, cache_dir: str = "") -> None:
    """Write `out` and print what it holds. Raises ConfigError when `source` is not supported, ProofError when logits differ."""
    if not is_published(source):
        raise ConfigError(f"{source!r} is no folder with config.json and no hub id of a published model")
    config = config_of(source, cache_dir)
    template, card = open_vocabulary(config, ALONE)
    processor = Processor(template, card.specs, config.data)
    with new_folder(out) as folder:
        model = built(card)
        write_all_parts(model, card, folder, link)
        processor.save(folder)
        (folder / "run.toml").write_text(to_toml(run_file(source, cache_dir, out)))
        check_loadable(folder)
        write_proof(folder, "every tensor's bytes, after reopening")
        proof = prove_import(source, model, processor, cache_dir)
    print(f"{proof}\n{out}:\n{listing(out)}")
    print(f"{out / 'run.toml'} starts from {source}, whose tensors {out} holds too, and writes into {out.absolute()}-run")
    cfg = shlex.quote(str(out / "run.toml"))
    print(f"next: python -m trainer.main --cfg {cfg} data.sources.0.path=YOUR.json data.sources.0.media_root=ITS_MEDIA")


ALONE = World(0, 0, 1, torch.device("cpu"))


def config_of(source: str, cache_dir: str) -> RunConfig:
    """Return the configuration that `source` is read with: nothing learns, numbers keep the type of the files."""
    dtype = stored_dtype(source, cache_dir)
    model = {"init_from": source, "cache_dir": cache_dir, "dtype": dtype, "llm": {"tune": "frozen"}}  # so that an adapter is merged
    resolved, problems = resolve_published({"output_dir": "unused", "model": model, "train": {"max_steps": 0}})
    if problems:
        raise ConfigError("; ".join(problems))
    for part in ("vision_projector", "audio_projector"):
        if part in resolved["model"]:
            resolved["model"][part]["tune"] = "frozen"
    return parse_config(resolved, source)


def stored_dtype(source: str, cache_dir: str) -> str:
    """Return the type of a model's numbers: bfloat16 where config.json says so; float32 holds those of all others exactly."""
    found = read_json(SETTING, source, "config.json", cache_dir)
    return "bfloat16" if found.get("dtype", found.get("torch_dtype")) == "bfloat16" else "float32"


def built(card: ModelCard) -> MultimodalLM:
    """Build the model with its weights."""
    model = assemble(card, DTYPES[card.model.dtype])
    materialise(model, weight_layers(card, model, seed=0), frozen_dtype=model.dtype, device=torch.device("cpu"))
    return model.eval()


def write_all_parts(model: MultimodalLM, card: ModelCard, folder: Path, link: bool) -> None:
    """Write the parts and model.json. With `link`, parts that a base holds are left there, and its digest is noted."""
    linked = set(card.hugging_face) if link else set()
    config = card.model
    for name, part in config.parts().items():
        if name in linked:
            continue
        write_merged_part(folder, name, model)
        alone: dict[str, Any] = {"tune": "full"} if name in card.hugging_face else {"path": ""}
        alone |= {"adapter": ""} if name == "llm" else {}
        config = replace(config, **{name: replace(part, **alone)})  # type: ignore[arg-type]
    bases = base_digests(card.model) if link else {}
    write_card(replace(card, model=config, bases=bases), folder)


def prove_import(source: str, model: MultimodalLM, processor: Processor, cache_dir: str) -> str:
    """Compare the model with transformers' class of `source`, in float32, and return one line about it."""
    found = find_layout(SETTING, source, cache_dir)
    if found is None or not (name := found[0].reference):
        return "transformers has no class for this layout: nothing to compare with"
    with sample(processor) as record:
        batch = batch_of(processor, record)
    difference = prove_against(name, source, cache_dir, batch, processor.specs, logits(in_float32(model), batch))
    return f"float32 logits: {name} and this model within {difference:.1e} of the largest"


def run_file(source: str, cache_dir: str, out: Path) -> dict[str, Any]:
    """Return a run file that starts from `source`: what follows from it, LoRA on the language model, the user's own records.

    It works from any folder, and its run is written beside `out`.
    """
    source = str(Path(source).absolute()) if Path(source).is_dir() else source
    model: dict[str, Any] = {"init_from": source, "llm": {"tune": "lora"}}
    if cache_dir:
        model["cache_dir"] = cache_dir
    resolved, _ = resolve_published({"output_dir": f"{out.absolute()}-run", "model": model, "data": {}})
    base = resolved["model"]["llm"]["path"]
    positions = part_config(SETTING, "llm", base, cache_dir).get("max_position_embeddings", MAX_LENGTH)
    resolved["data"]["max_length"] = min(positions, MAX_LENGTH)
    resolved["data"]["sources"] = [{"path": "train.json"}]
    return resolved


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("import_model", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="a folder or hub id of a published model")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--link", action="store_true", help="leave the towers and the language model in SOURCE")
    parser.add_argument("--cache-dir", default="", help="where files of the hub are kept")
    given: argparse.Namespace = parser.parse_args(arguments)
    return run_command("import_model", lambda: import_model(given.source, given.out, link=given.link, cache_dir=given.cache_dir))


if __name__ == "__main__":
    raise SystemExit(main())
