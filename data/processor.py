"""Conversion of records to batches outside training: the same template and media code that training used, read from the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.collate import collate
from data.config import DataConfig
from data.fit_problems import PIXEL_BUDGETS
from data.media.blob import Blob, inline_blob, resolve_path
from data.media.record_media import RecordMedia
from data.positions import inside_ids
from data.prompts import encode_prompt
from data.records.record import MediaRef, Record, parse
from data.sample import Sample, assemble_sample, check_media
from data.text.chat_formats import freeze_date
from data.text.state_tokens import split_state
from data.text.template import Template, TemplateOptions, load_template
from data.text.tokenizer import check_fingerprint, load_tokenizer, pad_id, save_tokenizer, tokenizer_fingerprint
from model.batch import Batch
from model.errors import ConfigError
from model.files.untrusted import Json, load_json
from model.media_spec import MediaSpec, placeholder_tokens, spec_from_json, spec_to_json

FILE = "processor.json"
_VERSION = 2
_CONFIG_KEYS = (
    *("image_fit", "image_decode", "min_tiles", "max_tiles", "thumbnail", "image_grid", "anyres_max"),
    *("max_length", "max_images", "max_pixels"),
    *("state_tokens", "fps", "min_frames", "max_frames", "max_seconds"),
)
_LATER_KEYS = (*PIXEL_BUDGETS, "side_tiles", "cut_tiles", "frame_times")
"""Settings that runs of earlier versions did not have."""


@dataclass(frozen=True)
class Processor:
    """Converter of records into batches and of ids into text. `load_processor` makes that of a run."""

    template: Template
    specs: dict[str, MediaSpec]
    config: DataConfig

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.template.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        return self.template.stop_ids

    def __call__(
        self, records: Sequence[Json], answers: bool = False, media_root: str | None = None, thinking: bool = False
    ) -> Batch:
        """Make a batch of records in the form that training reads.

        answers=True: whole conversations with labels, right-padded, as in training. answers=False: prompts, left-padded, for
        `generate`: all turns up to the answer that is asked for, without it where the record holds one; of any length. media_root:
        the folder that media must stand in, as a source's; None: a person names the files, from the current directory or by
        absolute paths. thinking: prompts are those of answers that begin with a thought, where a record has no answer that decides
        it. Raises `RecordError` for the first bad record, called `records:i` after the record's place.
        """
        samples = [self._sample(i, record, answers, media_root, thinking) for i, record in enumerate(records)]
        return collate(samples, pad_id(self.tokenizer), "right" if answers else "left")

    def decode(self, ids: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """Decode each row up to its first stop id, without special tokens and the white space around the text."""
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        return [self.tokenizer.decode(self._before_stop(row), skip_special_tokens=True).strip() for row in rows]

    def answers(self, ids: Sequence[Sequence[int]] | Tensor) -> list[tuple[str | None, str]]:
        """Return each row of generated ids as its state (`data.text.state_tokens`; None without) and its text, without the state
        and special tokens.
        """
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        # With special tokens: a state may be one.
        whole = [self.tokenizer.decode(self._before_stop(row)) for row in rows]
        states = [split_state(text, self.config.state_tokens)[0] for text in whole]
        return [(state, split_state(text, self.config.state_tokens)[1].strip()) for state, text in zip(states, self.decode(rows))]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files and processor.json; the same processor gives the same bytes."""
        folder = Path(folder)
        save_tokenizer(self.tokenizer, folder, chat_template=self.template.source)
        text = json.dumps(self._to_json(), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    def _sample(self, i: int, raw: Json, answers: bool, media_root: str | None, thinking: bool) -> Sample:
        record = parse(raw, f"records:{i}", needs_answer=answers)
        check_media(record, self.specs, self.config.max_images)
        record = self.media(record, media_root).timed()
        limit = self.config.max_length if answers else None
        encoded = self.template.encode(record, limit) if answers else encode_prompt(self.template, record, thinking)
        media = self.media(record, media_root)
        return assemble_sample(encoded, self.template.placeholder_ids, media, max_length=limit, sample_id=i, source_id=0)

    def media(self, record: Record, media_root: str | None = None) -> RecordMedia:
        """Return the media of `record`, located as in a call."""
        ids = inside_ids(self.tokenizer, self.specs, self.config)
        return RecordMedia(record, lambda ref: self._locate(ref, media_root), self.specs, self.config, ids)

    def _locate(self, ref: MediaRef, media_root: str | None) -> Blob:
        if (inline := inline_blob(ref.path)) is not None:
            return inline
        path = ref.path if media_root is None else resolve_path(ref.path, media_root, follow_links=self.config.follow_links)
        return Blob(path, path)

    def _before_stop(self, ids: Sequence[int]) -> Sequence[int]:
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return ids[:stop]

    def _to_json(self) -> Json:
        template = self.template
        described = {
            "name": template.name,
            "jinja": template.source,
            "system": template.system,
            "placeholders": template.placeholders,
            "media_wrap": list(template.media_wrap),
            "allowed": list(template.allowed),
        }
        return {
            "version": _VERSION,
            "transformers": transformers.__version__,
            "template": described,
            "specs": {modality: spec_to_json(spec) for modality, spec in self.specs.items()},
            "fingerprint": tokenizer_fingerprint(self.tokenizer),
            "stop_ids": list(self.stop_ids),
            **{key: getattr(self.config, key) for key in (*_CONFIG_KEYS, *_LATER_KEYS)},
        }


def load_processor(folder: str | Path) -> Processor:
    """Load the processor that a run wrote into its final/ or a checkpoint.

    Raises `ConfigError` if files are missing or of another version, or if this machine's transformers reads the tokenizer's files
    in another way than the run did.
    """
    folder = Path(folder)
    stored = _read_json(folder / FILE)
    try:
        described, specs = stored["template"], {m: spec_from_json(spec) for m, spec in stored["specs"].items()}
        placeholders, media_wrap = described["placeholders"], tuple(described["media_wrap"])
        system = described.get("system", "")  # runs of earlier versions have none
        config = DataConfig(described["name"], system=system, placeholders=placeholders, media_wrap=media_wrap)
        config = replace(config, **{key: stored[key] for key in _CONFIG_KEYS})
        config = replace(config, **{key: stored[key] for key in _LATER_KEYS if key in stored})
        config = replace(config, image_grid=tuple(tuple(s) if isinstance(s, list) else s for s in stored["image_grid"]))
        expected, jinja, allowed = stored["fingerprint"], described["jinja"], described["allowed"]
        stop_ids = tuple(stored["stop_ids"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / FILE} is damaged: {type(error).__name__} {error}; take it from the run again") from error
    tokenizer = load_tokenizer(str(folder), ()).tokenizer
    check_fingerprint(tokenizer, expected)
    template = load_template(
        config.template,
        tokenizer,
        TemplateOptions(
            placeholders=placeholders,
            media_wrap=media_wrap,
            allowed=allowed,
            state_tokens=config.state_tokens,
            system=system,
            tokens=placeholder_tokens(specs),
        ),
    )
    # What is stored has its date frozen already; loading may freeze it once more, which changes the text but not what it renders.
    if template.source not in (jinja, freeze_date(jinja)) or template.stop_ids != stop_ids:
        raise ConfigError(f"{folder}: template {template.name!r} is not the one the run used; restore the files of the run")
    return Processor(replace(template, source=jinja), specs, config)


def _read_json(file: Path) -> Json:
    try:
        stored = load_json(file)
    except OSError as error:
        final = file.parent / "final"
        hint = f"did you mean {final}?" if (final / FILE).is_file() else "name a final/ or checkpoint folder of a run"
        raise ConfigError(f"{file} cannot be read: {error.strerror}; {hint}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}; take it from the run again") from error
    if not isinstance(stored, dict) or stored.get("version") != _VERSION:
        found = stored.get("version") if isinstance(stored, dict) else stored
        raise ConfigError(f"{file} has version {found!r}, this program reads {_VERSION}")
    return stored
