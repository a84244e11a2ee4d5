"""Opening the data of a run: tokenizer, template, specs, datasets and their certificates."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data.check.certificate import certify
from data.check.measured_lengths import ESTIMATED
from data.config import SourceConfig
from data.dataset import MultimodalDataset, open_dataset
from data.media.pixel_budget import check_budgets
from data.order.mixing import Pool, make_pools
from data.order.sampler import Sampler
from data.processor import Processor
from data.text.template import Template, TemplateOptions, load_template
from data.text.tokenizer import load_tokenizer, pad_id
from model.card import ModelCard, base_digests, make_card, media_specs, read_card
from model.config import AudioConfig, VisionConfig
from model.errors import ConfigError, DataError
from model.files.tensor_files import sampled_digest
from model.llm.causal_lm import check_positions
from model.media_spec import placeholder_tokens
from model.preference.config import PAIRED
from trainer.config import RunConfig
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.machine.run_folder import check_folder
from trainer.records import freeze_lengths
from trainer.records.feeding import UnfedError, check_fed, inherited_modalities, refused_records
from trainer.records.quarantine import TRAIN, VALIDATION, read_excluded
from trainer.records.vocabulary import check_surplus, num_base_rows, plan_vocabulary
from trainer.runfile.part_checks import check_fit
from trainer.runfile.stages import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """Data that a run reads, and the card of the model that can read it."""

    card: ModelCard
    processor: Processor
    train: MultimodalDataset | None
    validation: MultimodalDataset | None
    sampler: Sampler | None
    pools: tuple[Pool, ...] = ()  # what each source of `train` gives
    validation_pools: tuple[Pool, ...] = ()
    lengths_kind: str = ESTIMATED  # exact | partly exact | estimated: the lengths that the run is planned by
    certificates: Sequence[str] = ()  # one line per source, once it is certified: what was proven of its rows

    @property
    def num_records(self) -> dict[str, int]:
        """Return the number of records that take part, by split; a split without sources is absent."""
        pools = {TRAIN: self.pools, VALIDATION: self.validation_pools}
        return {split: sum(len(pool.ids) for pool in found) for split, found in pools.items() if found}

    @property
    def datasets(self) -> dict[str, MultimodalDataset]:
        """Return the datasets by split; a split without sources is absent."""
        splits = {TRAIN: self.train, VALIDATION: self.validation}
        return {split: dataset for split, dataset in splits.items() if dataset is not None}

    @property
    def pad_id(self) -> int:
        return self.card.pad_id

    @cached_property
    def digest(self) -> str:
        """Return the fingerprint of what decides the order of the data (planned lengths, modalities) and of the record sizes.

        The planned lengths were frozen at the first start: they alone would not reveal that a data file was edited since.
        """
        if self.train is None:
            return ""
        digest = hashlib.sha256()
        for array in (self.train.lengths, self.train.modalities, *(index.lengths for index in self.train.indexes)):
            digest.update(np.ascontiguousarray(array, dtype=np.int32).tobytes())
        return digest.hexdigest()

    def training(self) -> tuple[MultimodalDataset, Sampler]:
        """Return the training data and the order of its samples. Raises `ValueError` for a run without [[data.sources]]."""
        if self.train is None or self.sampler is None:
            raise ValueError("nothing to train")
        return self.train, self.sampler


def open_data(
    config: RunConfig,
    world: World,
    *,
    first_start: bool = False,
    stage: Stage | None = None,
    on_progress: Callable[[str], object] = lambda at: None,
) -> RunData:
    """Open all data of the run, or of one `stage` of it; no weight is loaded. Collective.

    Rank 0 builds missing indexes, which the other ranks then map. `first_start`: the run or stage begins at step 0, and its
    planned lengths are frozen now. `on_progress` is called now and then with what is being read.
    """
    stage = stage or Stage(config, config)
    template, card = open_vocabulary(config, world)
    specs, data, folder = card.specs, config.data, Path(config.output_dir)
    check_folder(folder)
    check_positions(card.hugging_face["llm"], data.max_length)

    def opened(sources: tuple[SourceConfig, ...], report: Callable[[str], object]) -> MultimodalDataset:
        dataset = open_dataset(sources, data, template, specs, folder / "index", report)
        dataset.answers = "pairs" if config.preference.kind in PAIRED else "judged" if config.preference.is_on else "one"
        return dataset

    tables = {TRAIN: data.sources, VALIDATION: data.validation}
    if world.is_main:
        signs = freeze_lengths.MainRankProgress(world, on_progress)
        found = {split: opened(sources, signs) for split, sources in tables.items() if sources}
        if first_start:
            freeze_lengths.measure_and_freeze(found, config, stage.folder, signs)
    freeze_lengths.wait_for_main_rank(world)  # collective: the indexes exist now, and lengths are frozen
    datasets = {split: opened(sources, on_progress) for split, sources in tables.items() if sources}
    if TRAIN in datasets:
        datasets[TRAIN].exclude(read_excluded(folder, stage.name))
    kinds = freeze_lengths.load_lengths(datasets, config, stage.folder)
    freeze_lengths.check_same_lengths(datasets, world)  # collective
    train, validation = (datasets.get(split) for split in tables)
    pools, held_out = (() if dataset is None else pools_of(dataset, config) for dataset in (train, validation))
    sampler = None
    if train is not None:
        sampler = Sampler(train.lengths, train.modalities, config.batch.global_batch_size, config.seed, data.order, pools)
    processor = Processor(template, specs, data)
    return RunData(card, processor, train, validation, sampler, pools, held_out, kinds.get(TRAIN, ESTIMATED))


def open_vocabulary(config: RunConfig, world: World) -> tuple[Template, ModelCard]:
    """Return the tokenizer with its template, and the card of the model that has a row for each of its tokens."""
    added = added_tokens(config)
    num_rows = num_base_rows(config.model)  # first: a folder that is no language model has no tokenizer either
    vocabulary = load_tokenizer(config.model.llm.path, added, config.model.cache_dir)
    surplus = check_surplus(config.model, vocabulary, num_rows)
    data = config.data
    if surplus.learned and world.is_main:
        log.warning("%s", surplus)
    template = load_template(
        data.template,
        vocabulary.tokenizer,
        TemplateOptions(
            placeholders=data.placeholders,
            media_wrap=data.media_wrap,
            allowed=added,
            state_tokens=data.state_tokens,
            unread=surplus.unread,
            system=data.system,
            answer_end=data.answer_end,
            tokens=placeholder_tokens(media_specs(config.model)),
        ),
    )
    layout = plan_vocabulary(config.model, vocabulary, num_rows)
    card = make_card(config.model, config.lora, layout, quantize=config.quantize)
    check_fit(data, card.specs)
    check_budgets(data, card.specs)
    return template, replace(card, tokens=added, stop_ids=template.stop_ids, pad_id=pad_id(vocabulary.tokenizer))


def pools_of(dataset: MultimodalDataset, config: RunConfig) -> tuple[Pool, ...]:
    """Return the pool of each source, as its `take` and `weight` define it."""
    sources = dataset.sources
    return make_pools(
        [source.key for source in sources],
        [len(index) for index in dataset.indexes],
        [source.take for source in sources],
        [source.weight for source in sources],
        config.seed,
        config.data.order == "sequential",
    )


def with_base_digests(data: RunData, world: World) -> RunData:
    """Return `data` with fingerprints of the base weights on the card. Collective.

    Rank 0 computes them, so a hub id is downloaded once. Raises `ConfigError` on all ranks alike.
    """
    bases = on_main_rank(world, lambda: base_digests(data.card.model) | given_digests(data.card))
    return replace(data, card=replace(data.card, bases=bases))


def given_digests(card: ModelCard) -> dict[str, str]:
    """Return fingerprints of the files that are named beside the bases, so that a resumed run notices when one was replaced."""
    parts = card.model.parts().items()
    named = {
        "model.init_from": card.model.init_from,
        "lora.path": card.lora.path,
        **{f"model.{name}.path": part.path for name, part in parts if name not in ("llm", "vision", "audio")},
        **{f"model.{name}.weights": part.weights for name, part in parts if isinstance(part, VisionConfig | AudioConfig)},
    }
    found = {}
    for key, path in named.items():
        folder = Path(path).is_dir()
        files = sorted(f for f in Path(path).iterdir() if f.suffix in (".safetensors", ".bin")) if folder else [Path(path)]
        if path and all(file.is_file() for file in files):
            found[key] = sampled_digest(files)
    return found


def certify_all(data: RunData, config: RunConfig, on_progress: Callable[[str], object] = lambda at: None) -> list[str]:
    """Certify every source and return one line per source: what was proven of its rows. `on_progress` is called with the next row.

    Raises `DataError` when a source cannot be proven, `ConfigError` when the model's parts and the data do not go together.
    """
    if data.train is not None:
        try:
            check_fed(data.train, data.pools, inherited_modalities(config.model))
        except UnfedError as error:
            # Media of a record that breaks the rules are not counted: that rule is what the user has to repair first.
            share, refused = refused_records(data.train, data.pools)
            if share > 0.5:
                raise DataError(refused if share == 1 else f"{refused}. Without them {error}") from error
            raise ConfigError(f"{error}; {refused}" if refused else str(error)) from error
    return [
        str(certify(data.processor.template, index, source.key, max_length=config.data.max_length, on_progress=on_progress))
        for dataset in data.datasets.values()
        for source, index in zip(dataset.sources, dataset.indexes)
    ]


def added_tokens(config: RunConfig) -> tuple[str, ...]:
    """Return the tokens added to the base tokenizer, in order: those of the run it starts from, placeholders, new ones."""
    inherited = read_card(Path(config.model.init_from)).tokens if config.model.init_from else ()
    placeholders = tuple(spec.placeholder for spec in media_specs(config.model).values())
    return tuple(dict.fromkeys((*inherited, *placeholders, *config.model.llm.new_tokens)))
