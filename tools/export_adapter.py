"""Export a run for others: its adapter files, LLaVA's projector, a PEFT folder, or a whole folder for transformers.

SOURCE is a final/ folder or any checkpoint-N of a run. OUT must not exist yet, or be empty.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started as a file, its own folder is on the path and not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.processor import load_processor
from data.text.tokenizer import save_tokenizer
from model.card import ModelCard, read_card
from model.errors import ConfigError
from model.exports import hugging_face
from model.exports import llava as export_llava
from model.exports.llm_folder import inherited_parts, write_llm
from model.exports.trained_files import PROJECTORS, changed_parts, llm_adapter, projector, trained_files, write_file
from model.files.tensor_files import dump_json
from model.load import load_model
from model.weights.peft_adapter import INHERITS, OUR_CONFIG, OURS, WEIGHTS, adapter_config, write_config
from tools.cli import run_command
from tools.exports.hf_folder import prove_folder, write_folder
from tools.exports.output_folder import listing, new_folder


def to_safetensors(source: Path, out: Path, card: ModelCard, _: Path) -> str:
    """Write one file per part that was trained beside the language model's own weights."""
    files = trained_files(source, card)
    if not files:
        raise ConfigError(f"{source} trained nothing beside the language model's own weights; copy its llm*.safetensors instead")
    for name, tensors in files.items():
        write_file(out / name, tensors)
    inherits = OURS in files and bool(inherited_parts(source, card) & card.lora_parts)
    if OURS in files:
        settings: dict[str, Any] = {key: getattr(card.lora, key) for key in ("rank", "alpha", "rslora", "bias")}
        (out / OUR_CONFIG).write_text(dump_json({**settings, INHERITS: inherits}))
    if card.model.llm.tune == "full":
        print("not exported: llm (tune = 'full'), which is the language model itself; --for hf writes all of it")
    return f"python -m trainer.main --cfg run.toml {to_go_on(source, card, set(files), inherits)}"


def to_go_on(source: Path, card: ModelCard, files: set[str], inherits: bool) -> str:
    """Return settings, beside those of the run's own file, with which a run starts from everything that `source` has learned.

    The settings name the exported `files`, if each file has a setting and no weight comes from elsewhere; else the run that made
    them.
    """
    parts = [part for part in PROJECTORS if part in card.model.parts()]
    keys = {**{f"{part}.safetensors": f"model.{part}.path" for part in parts}, OURS: "lora.path"}
    # A language model that was trained whole is not read: the run names it in any case.
    if files <= keys.keys() and not inherits and card.model.llm.tune != "full":
        covered = {file.removesuffix(".safetensors") for file in files} | (card.lora_parts if OURS in files else set())
        if changed_parts(source, card) <= covered:
            return " ".join(f"{key}={{out}}" for file, key in keys.items() if file in files) + " model.init_from="
    if alone := sorted(files - keys.keys()) + ([OURS] if inherits else []):
        print(f"no setting reads {', '.join(alone)} alone: to go on with all that was trained, the run itself is named")
    named = {"lora.path": card.lora.path, **{f"model.{part}.path": getattr(card.model, part).path for part in parts}}
    return " ".join([f"model.init_from={shlex.quote(str(source))}", *(f"{key}=" for key, path in named.items() if path)])


def to_llava(source: Path, out: Path, card: ModelCard, _: Path) -> str:
    """Write LLaVA's mm_projector.bin."""
    export_llava.check_exportable_llava(card)
    path = export_llava.write_projector(out, projector(source, card))
    others = [f"{name} (tune = {part.tune!r})" for name, part in card.model.parts().items() if part.tune != "frozen"]
    if others := [text for text in others if not text.startswith("vision_projector ")]:
        print(f"not exported: {', '.join(others)}: LLaVA reads the projector alone from this file")
    return f"(in LLaVA) python llava/train/train_mem.py --pretrain_mm_mlp_adapter {{out}}/{path.name} ..."


def to_peft(source: Path, out: Path, card: ModelCard, named: Path) -> str:
    """Write a PEFT adapter folder for the language model, with the model it belongs to if an earlier run trained that."""
    tensors, paths = llm_adapter(source, card)
    base = card.model.llm.path
    if "llm" in inherited_parts(source, card):
        base = str(named / "base")
        (out / "base").mkdir()
        write_llm(source, out / "base", card)
        save_tokenizer(load_processor(source).tokenizer, out / "base")
        print(f"an earlier run trained the language model: it stands in {base}, where the adapter belongs")
    elif card.quantize.bits != 16:
        print(f"the adapter was trained beside {base} in {card.quantize.bits} bits: load that so, or use tools.merge_lora")
    if base == card.model.llm.path and card.vocabulary.new_ids:
        print(f"not in an adapter: {len(card.vocabulary.new_ids)} new rows of the vocabulary ({', '.join(card.tokens)})")
    write_file(out / WEIGHTS, tensors)
    write_config(out, adapter_config(card.lora, base, paths))
    return (
        'python -c "from peft import PeftModel; from transformers import AutoModelForCausalLM as M; '
        f"PeftModel.from_pretrained(M.from_pretrained({base!r}), '{{out}}')\""
    )


def to_hf(source: Path, out: Path, card: ModelCard, _: Path) -> str:
    """Write a merged folder for LlavaForConditionalGeneration and AutoProcessor, reopened and compared."""
    hugging_face.check_exportable_hf(card)
    model, processor = load_model(source), load_processor(source)
    write_folder(out, card, model, processor)
    difference = prove_folder(out, model, processor)
    print(f"reopened with transformers: ids and pixels equal, logits within {difference:.1e} of the largest")
    return "python -c \"from transformers import LlavaForConditionalGeneration as M; M.from_pretrained('{out}')\""


TARGETS: dict[str, Callable[[Path, Path, ModelCard, Path], str]] = {
    "safetensors": to_safetensors,
    "llava": to_llava,
    "peft": to_peft,
    "hf": to_hf,
}
"""Writers by kind of folder: each takes (source, folder to fill, card, its later name) and returns the command to type next."""


def export(source: Path, out: Path, target: str = "safetensors") -> None:
    """Write `out`, whole or not at all, and print what it holds."""
    card = read_card(source)
    with new_folder(out) as folder:
        following = TARGETS[target](source, folder, card, out)
    following = following.replace("'{out}'", repr(str(out))).replace("{out}", shlex.quote(str(out)))
    print(f"{out}:\n{listing(out)}\nnext: {following}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_adapter", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a final/ folder or a checkpoint-N")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    described = "\n".join(f"{name}: {(write.__doc__ or '').strip()}" for name, write in TARGETS.items())
    parser.add_argument("--for", dest="target", choices=TARGETS, default="safetensors", help=described)
    given = parser.parse_args(arguments)
    return run_command("export_adapter", lambda: export(given.source, given.out, given.target))


if __name__ == "__main__":
    raise SystemExit(main())
