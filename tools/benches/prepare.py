"""Puts all that contenders need into one folder: the model as our parts and as a folder of transformers, and the steps' records."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
from transformers import AutoProcessor
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging

from model.files.untrusted import Json
from tools.benches.contender import CONTENDERS, GROUPED, RANDOM
from tools.benches.mix import SIZES, Size, write_bench_run, write_mix
from tools.benches.native_mix import write_native_mix, write_native_run
from tools.benches.reader import NativeReader, ProcessorReader
from tools.export_adapter import export
from trainer.main import main as train

HF = "hf"


def prepare(folder: Path, size_name: str, steps: int, dtype: str, family: str = "") -> dict[str, float]:
    """Fill `folder` and return, by order, the useful share of a batch over a whole epoch that is padded to its longest sample.

    Every order has one record more than `steps` steps need, times the batch: loaders may read one batch ahead.
    """
    logging.disable_progress_bar()
    size = SIZES[size_name]
    if family:
        records = write_native_mix(folder, size)
        lengths = NativeReader(folder, records).lengths()
    else:
        records = write_mix(folder, size)
        write_model(folder, size, records)
        lengths = ProcessorReader(folder, records, AutoProcessor.from_pretrained(folder / HF, trust_remote_code=False)).lengths()
    write_run = write_native_run if family else write_bench_run
    shares = {}
    for order, batches in _plan(lengths, size.batch).items():
        slots = np.array([lengths[batch].max() * len(batch) for batch in batches])
        shares[order] = float(sum(lengths[batch].sum() for batch in batches) / slots.sum())
        chosen = _spread(batches, lengths, steps + 1)
        taken = [{**records[i], "id": f"{n}"} for n, i in enumerate(np.concatenate(chosen))]
        (folder / f"{order}.json").write_text(json.dumps(taken), encoding="utf-8")
        useful = [int(lengths[batch].sum()) for batch in chosen]
        (folder / f"{order}.tokens.json").write_text(json.dumps(useful), encoding="utf-8")
    for contender in CONTENDERS.values():
        if name := contender.run:
            (folder / f"{name}.json").write_text((folder / f"{contender.order}.json").read_text(encoding="utf-8"), encoding="utf-8")
            changes = {"packing": name in ("packed", "compiled"), "compile": name == "compiled", "dtype": dtype}
            # A step more than is measured: the save of the last one, which the others do not make, stays out of it.
            write_run(folder, name, size, steps + 1, changes)
    return shares


def write_model(folder: Path, size: Size, records: list[Json]) -> None:
    """Write folder/hf: the untrained model for transformers, with the values that our runs begin with."""
    (folder / "start.json").write_text(json.dumps(records[: size.batch]), encoding="utf-8")
    said = StringIO()
    with redirect_stdout(said):
        code = train(["--cfg", str(write_bench_run(folder, "start", size, 0, {}))])
        if code == 0:
            export(folder / "runs" / "start" / "final", folder / HF, "hf")
    if code:
        raise RuntimeError(f"the untrained model was not built:\n{said.getvalue()}")


def _plan(lengths: np.ndarray, size: int) -> dict[str, list[np.ndarray]]:
    """Return the whole batches of an epoch, by order: at random, and by the sampler of transformers' `group_by_length`."""
    whole = len(lengths) // size * size
    random = np.random.default_rng(1).permutation(len(lengths))[:whole]
    grouped = np.array(get_length_grouped_indices(lengths.tolist(), size))[:whole]
    return {name: list(order.reshape(-1, size)) for name, order in ((RANDOM, random), (GROUPED, grouped))}


def _spread(batches: list[np.ndarray], lengths: np.ndarray, num: int) -> list[np.ndarray]:
    """Choose `num` batches at even distances of the epoch's batches sorted by tokens, shuffled: a fair draw of few steps."""
    by_tokens = sorted(batches, key=lambda batch: int(lengths[batch].sum()))
    places = (np.arange(num) + 0.5) * len(by_tokens) / num
    chosen = [by_tokens[int(place)] for place in places]
    return [chosen[i] for i in np.random.default_rng(2).permutation(num)]
