"""The run file of a dry run: small parts, made-up records where files are missing, two steps per stage; all else as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from data.config import SourceConfig
from data.index.record_index import source_files
from model.config import AudioConfig, VisionConfig
from model.errors import ConfigError, DataError
from model.files.untrusted import Json
from model.multimodal import ENCODERS
from trainer.config import RunConfig, StageConfig
from trainer.runfile.merge_tables import merge_into, nested, value_of, without_key
from trainer.runfile.schema import SchemaReader, to_tables
from trainer.runfile.stages import list_stages
from trainer.trial.made_up_records import kinds_of, make_source
from trainer.trial.reachable_parts import PARTS
from trainer.trial.small_parts import make_encoder, make_llm, make_tower

STEPS, SAMPLES = 2, 2
_EMPTIED = ("model.init_from", "model.llm.adapter", "model.vision.weights", "model.audio.weights", "lora.path")
_PROJECTORS = ("vision_projector", "audio_projector", "state_head")


@dataclass(frozen=True)
class Fed:
    """Media that the parts of a stage read: kinds, those that they cannot do without, and classes that clips name."""

    read: frozenset[str]
    needed: frozenset[str]
    num_states: int


@dataclass
class SmallRun:
    """The run of a dry run while it is made."""

    root: RunConfig  # at full size
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    notes: list[str] = field(default_factory=list)  # what was made up
    places: dict[tuple[str, str], str] = field(default_factory=dict)  # folder of the small part, by part and path

    def make(self) -> RunConfig:
        """Write the parts and records that are needed, and return the run."""
        stages = list_stages(self.root)
        for stage in stages:
            for name in PARTS:  # the language model first: the others are built beside it
                part = stage.config.model.parts().get(name)
                if part is not None and (name, getattr(part, "path", "")) not in self.places:
                    self._make_part(name, part, stage.config)
        tables = to_tables(self.root)
        fed = [self._fed(stage.config, is_first=stage.number == 1) for stage in stages]
        small = self._shrunk(tables, fed[0])  # above all stages stands the first one
        small |= {
            "output_dir": str(self.folder / "run"),
            "train": {"max_steps": STEPS, "deterministic": self.root.train.deterministic},
            "log": {"every": 1},
            "checkpoint": {"every": 10**6, "keep": 1},
        }
        small["batch"] = small["batch"] | {"global_batch_size": SAMPLES, "micro_batch_size": 1}
        small["data"] = small["data"] | {"workers": 0, "max_bad_fraction": 0.9}
        if small["parallel"]["strategy"] == "hsdp":
            small["parallel"] |= {"strategy": "fsdp", "shard_size": 0}
            self.notes.append("parallel.strategy = 'hsdp' is tried as 'fsdp'")
        small["stage"] = [self._stage(stage, own) for stage, own in zip(tables["stage"], fed)]
        return run_of(small)

    def _stage(self, stage: Json, fed: Fed) -> Json:
        """Return a stage of the small run; the length and the batch of the stage are those of the run."""
        found = self._shrunk(stage, fed)
        for key in ("train", "batch.global_batch_size", "batch.micro_batch_size", "checkpoint", "log", "data.workers"):
            found = without_key(found, key)
        return found

    def _fed(self, config: RunConfig, *, is_first: bool) -> Fed:
        """Return what the parts of a stage read. A frozen part of an earlier stage needs no records."""
        parts = config.model.parts()
        read = {modality: names for modality, names in ENCODERS.items() if set(names) <= parts.keys()}
        learn = {kind for kind, names in read.items() if is_first or any(parts[name].tune != "frozen" for name in names)}
        head = config.model.state_head
        return Fed(frozenset(read), frozenset(learn), head.classes if head is not None else 0)

    def _make_part(self, name: str, part: object, config: RunConfig) -> None:
        model, path = config.model, getattr(part, "path", "")
        folder = self.folder / f"{name}-{len(self.places)}"
        if name == "llm":
            made = make_llm(model, self.tokenizer, folder)
        else:
            llm = Path(next(place for (kind, _), place in self.places.items() if kind == "llm"))
            if isinstance(part, VisionConfig):
                made = make_tower(part, model.cache_dir, llm, folder)
            else:
                assert isinstance(part, AudioConfig)
                made = make_encoder(part, model.cache_dir, llm, folder)
        self.places[name, path] = str(made)

    def _shrunk(self, tables: Json, fed: Fed) -> Json:
        """Return the tables of the run, or of a stage, with small parts, no weights of others and sources that exist."""
        model = dict(tables.get("model", {}))
        for name in ("llm", "vision", "audio"):
            if (path := value_of(model, f"{name}.path")) is not None:
                model[name] = model[name] | {"path": self.places[name, str(path)]}
        for name in _PROJECTORS:
            if path := value_of(model, f"{name}.path"):
                self.notes.append(f"weights of model.{name}.path = {path!r}")
                model[name] = model[name] | {"path": ""}
        found = {**tables, "model": model} if model else dict(tables)
        for key in _EMPTIED:
            if path := value_of(found, key):
                self.notes.append(f"weights of {key} = {path!r}")
                found = merge_into(found, nested(key, ""))
        if value_of(found, "model.llm.dequantize"):
            found = merge_into(found, nested("model.llm.dequantize", False))
        data = dict(found.get("data", {}))
        for split in ("sources", "validation"):
            if data.get(split):
                data[split] = self._sources(data[split], fed, split)
        return {**found, "data": data} if data else found

    def _sources(self, sources: list[Json], fed: Fed, split: str) -> list[Json]:
        """Return the sources of a split: the run's own where their files are there, made-up ones elsewhere."""
        found, kinds = [], [kinds_of(source, fed.read) for source in sources]
        unfed = fed.needed - {"image" if kind == "video" else kind for of in kinds for kind in of}
        for source, own in zip(sources, kinds):
            reason = missing(source)
            if not reason:
                found.append(source)
                continue
            own = (*(kind for kind in own if kind or not unfed), *sorted(unfed))
            unfed = frozenset()
            name = source.get("name") or Path(source["path"]).stem
            made = make_source(self.folder / split / name, name, own, fed.num_states)
            found.append({**source, **made, "take": "all"})
            self.notes.append(f"records of data.{split} {name!r}, {' and '.join(kind or 'text' for kind in own)}: {reason}")
        return found


def run_of(tables: Json) -> RunConfig:
    """Return the run of the tables that `to_tables` makes of one, unchecked. Raises `ValueError` where they are not such tables."""
    reader = SchemaReader()
    config: RunConfig | None = reader.table(RunConfig, {key: value for key, value in tables.items() if key != "stage"}, "")
    if config is None:
        raise ValueError(f"no tables of a run: {reader.problems}")
    stages = [
        StageConfig(stage["name"], {key: value for key, value in stage.items() if key != "name"}) for stage in tables["stage"]
    ]
    return replace(config, stage=tuple(stages))


def missing(source: Json) -> str:
    """Return why the records of a source cannot be read here; "" where they can."""
    config: SourceConfig = SchemaReader().table(SourceConfig, source, "")
    try:
        source_files(config)
    except (ConfigError, DataError) as error:
        return str(error).partition(":")[2].strip() or str(error)
    absent = [folder for folder in config.roots.values() if not Path(folder).is_dir()]
    return f"media_root = {absent[0]!r} is not there" if absent else ""
