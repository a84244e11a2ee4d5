"""The reference of preference tuning: the model that the run starts from.

Where adapters alone learn, and have no effect yet, it is the model without them. Otherwise the log-probability of every answer
under it is computed before step 1, and kept in a file beside the index for every later start and epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from data.check.measured_lengths import identities_of_files, identity_parts
from data.dataset import MultimodalDataset
from data.index.sidecar import open_atomically
from data.loader import batches_of, validation_ids
from model.batch import Answers
from model.errors import ConfigError
from model.files.shards import local
from model.files.tensor_files import read_safetensors
from model.lora import is_adapter
from model.preference.tuning import PreferenceTuning, measuring
from trainer.distributed.shards import reshard
from trainer.faults.phase_tracker import PhaseTracker
from trainer.records.quarantine import TRAIN
from trainer.setup import PreparedRun

MOST_ANSWERS = 3  # of one record
_NAMES = {"template": "the template", "tokenizer": "the tokenizer", "specs": "how media are read", "config": "[data]"}
KEY = "log_probs"
"""Name of the tensor (N, MOST_ANSWERS) in the file; NaN where there is no answer, or none could be read."""


def prepare_reference(prepared: PreparedRun, tracker: PhaseTracker) -> list[str]:
    """Make the reference known to model and data, before a checkpoint is restored, and return lines for people. Collective."""
    tuning = prepared.model.preference
    if tuning is None or not tuning.needs_reference or prepared.trained is None:
        return []
    if prepared.config.preference.reference == "auto" and (why := _why_stored(prepared)) == "":
        tuning.adapters_off = True
        return ["the model without its adapters"]
    lines = [] if prepared.config.preference.reference == "stored" else [f"stored: {why}"]
    return lines + [_load_or_compute(prepared, tuning, *found, tracker) for found in prepared.data.datasets.items()]


def _why_stored(prepared: PreparedRun) -> str:
    """Return why the reference is not the model without its adapters; "" where it is. Collective, host sync."""
    names = [name for name, p in prepared.model.named_parameters() if p.requires_grad]
    if others := [name for name in names if not is_adapter(name)]:
        return f"not only adapters learn, but {others[0]} too"
    used = torch.zeros((), device=prepared.world.device)
    for name, p in prepared.model.named_parameters():
        if name.endswith("lora_B"):
            used += local(p.detach()).ne(0).sum()
    return "" if prepared.world.sum(used).item() == 0 else "the adapters have learned before"


def _load_or_compute(
    prepared: PreparedRun, tuning: PreferenceTuning, split: str, dataset: MultimodalDataset, tracker: PhaseTracker
) -> str:
    """Give `dataset` the log-probabilities of its answers, from the file where that is valid. Collective."""
    stage = prepared.stage
    path = stage.run_folder / "index" / f"reference-{stage.name + '-' * bool(stage.name)}{split}.safetensors"
    identity = reference_identity(prepared, dataset)
    found = prepared.world.broadcast_json(_problem(path, identity, len(dataset)) if prepared.world.is_main else None)
    if found:
        dataset.reference = _compute(prepared, tuning, split, dataset, tracker)
        if prepared.world.is_main:
            _write(path, dataset.reference, identity)
        prepared.world.barrier()
        return f"{path.name} computed: {found}"
    dataset.reference = read_safetensors(path)[KEY].all().numpy().copy()
    return f"{path.name} of an earlier start"


def reference_identity(prepared: PreparedRun, dataset: MultimodalDataset) -> dict[str, str]:
    """Return a digest of everything that the values depend on, by what a person calls it."""
    card, config = prepared.data.card, prepared.config
    model = dataclasses.asdict(config.model)
    parts: dict[str, object] = {
        "the base": card.bases,
        "[model]": {**model, "attention": ""},
        "[quantize]": dataclasses.asdict(config.quantize),
        "[lora]": dataclasses.asdict(config.lora),
        "seed": config.seed,
        **{_NAMES.get(key, f"the data's {key}"): part for key, part in identity_parts(dataset).items()},
        "the records": identities_of_files(dataset),
    }
    return {key: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for key, part in parts.items()}


def _problem(path: Path, identity: dict[str, str], num_records: int) -> str:
    """Return why the file cannot be used, "" where it can."""
    if not path.exists():
        return "there was no file of an earlier start"
    try:
        values = read_safetensors(path)[KEY].all()
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()[KEY])
        before = said["identity"]
        if said["sha256"] != _digest(values) or values.shape != (num_records, MOST_ANSWERS) or not isinstance(before, dict):
            return "the file of an earlier start is damaged"
    except (ConfigError, SafetensorError, KeyError, TypeError, ValueError):
        return "the file of an earlier start is damaged"
    changed = [key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key)]
    return f"{' and '.join(sorted(changed))} changed since the file was written" if changed else ""


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def _write(path: Path, values: np.ndarray, identity: dict[str, str]) -> None:
    """Write the file atomically; equal values give equal bytes."""
    tensor = torch.from_numpy(values)
    said = json.dumps({"identity": identity, "sha256": _digest(tensor)}, sort_keys=True)
    with open_atomically(path) as file:
        file.write(save({KEY: tensor}, {KEY: said}))  # one entry: the library orders several differently in every process


def _compute(
    prepared: PreparedRun, tuning: PreferenceTuning, split: str, dataset: MultimodalDataset, tracker: PhaseTracker
) -> np.ndarray:
    """Compute the log-probabilities (N, MOST_ANSWERS) of all records that take part, each on one rank. Collective."""
    config, world, model = prepared.config, prepared.world, prepared.model
    pools = prepared.data.pools if split == TRAIN else prepared.data.validation_pools
    ids = validation_ids(dataset, 0 if split == TRAIN else config.validation.max_samples, pools)
    options = prepared.load_options(dataset, split, tracker)
    table = torch.zeros(len(dataset), MOST_ANSWERS)
    known = torch.zeros(len(dataset), MOST_ANSWERS)
    places: list[tuple[Tensor, Tensor]] = []
    model.eval()
    bar = tqdm(total=len(ids), desc=f"reference {split}", leave=False, disable=not world.is_main, delay=3)
    with torch.no_grad(), measuring(tuning) as measured, bar:
        for micro in batches_of(dataset, prepared.batch_plan, options, ids):
            tracker.report_progress(f"sample {micro.batch.sample_ids[0].item()}")
            if micro.batch.answers is not None:
                places.append(_places(micro.batch.sample_ids, micro.batch.answers))
            else:
                places.append((torch.zeros(0, dtype=torch.long),) * 2)
            prepared.wrapped(micro.batch.to(world.device))
            bar.update(len(micro.batch.lengths) * world.size)
    for (rows, columns), values in zip(places, measured):
        table[rows, columns], known[rows, columns] = values.cpu(), 1.0
    model.train()
    reshard(model)
    summed = world.sum(torch.stack([table, known]).to(world.device)).cpu()
    return torch.where(summed[1] > 0, summed[0], torch.nan).numpy()


def _places(sample_ids: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each answer in the table."""
    first = torch.searchsorted(answers.samples, answers.samples)
    return sample_ids[answers.samples], torch.arange(len(answers.samples)) - first
