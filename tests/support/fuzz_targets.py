"""What hostile bytes reach in this project, one function each: made in a folder, it takes bytes and raises where a law breaks.

Errors that people are meant to see are swallowed here; everything else that comes out is a defect.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.check.measured_lengths import Measurement, _read, write_measurement
from data.config import DataConfig, SourceConfig
from data.dataset import Rejected, open_dataset
from data.index.record_index import RecordIndex
from data.media import audio, image, video
from data.media.blob import Blob, MediaError
from data.records.media_refs import MediaRef
from data.sample import Sample
from model.card import read_card
from model.errors import ConfigError, DataError
from model.files.hub import hugging_face_config
from model.files.manifest import NAME as MANIFEST
from model.files.manifest import UnsoundCheckpoint, verify, write_manifest
from model.files.shards import checkpoint_tensors, write_shard
from model.files.tensor_files import LazyTensor, read_weights
from model.media_spec import AudioSpec, MediaSpec
from tests.support.hostile import png
from tests.support.runs import tables
from tests.support.tiny_data import SPEC, SPECS, grey, talk, template
from tests.support.tiny_media import animation, film, greys, tone, wav
from trainer.checkpoint.resume import read_state
from trainer.errors import ProofError
from trainer.runfile.load import load_config, parse_config
from trainer.runfile.overrides import apply_overrides
from trainer.runfile.schema import to_tables
from trainer.runfile.toml_files import to_toml

TOLD = (ConfigError, DataError)
"""DataError has RecordError, MediaError and TooLongError below it."""
SEEN: dict[str, MediaSpec] = {**SPECS}
CONFIG = DataConfig(max_pixels=1_000_000, max_length=200)
HEARD = AudioSpec(8, 3000, False, (2,))


@dataclass(frozen=True)
class Target:
    seeds: Sequence[bytes]
    run: Callable[[bytes], None]
    words: Sequence[bytes] = ()


def run_file(folder: Path) -> Target:
    """A run file is refused, or read; and what is read is written down so that it reads as the same again."""
    path = folder / "run.toml"
    good = [to_toml(tables(folder)).encode(), b'output_dir = "x"\n[model.llm]\npath = "a/b"\n[train]\nmax_steps = 0\n']

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(ConfigError):
            config = load_config(str(path))
            path.write_text(to_toml(to_tables(config)))
            assert load_config(str(path)) == config

    words = [b"[[stage]]\nname = 'a'\n", b"[data]\n", b'"""', b"[" * 60, b"a." * 60, b"nan", b"-inf", b"1979-05-27", b"true"]
    words += [b"media_root = {'a b' = 'x', '\\u007f' = 'y'}\n", b"\xff", b"\x00", b"9" * 5000, b"{" * 40, b"= "]
    return Target(good, run, words)


def overrides(folder: Path) -> Target:
    """An override is refused, or is one value at one place."""
    seeds = [
        b"optim.lr=1e-3",
        b"data.sources.0.path=x.json",
        b'model.llm.new_tokens=["<a>"]',
        b"train.max_steps=3",
        b"optim.lr=",
        b"a=\n[b]\nc=1",
    ]

    def run(data: bytes) -> None:
        base = tables(folder)
        with suppress(ConfigError):
            base, _ = apply_overrides(base, [data.decode("utf-8", "surrogateescape")])
            config = parse_config(base, "fuzz")
            to_toml(to_tables(config)).encode()

    return Target(seeds, run, [b"[" * 60, b"{a=1}", b"..", b"=", b"\n", b"9" * 400, b"nan", b'"', b"data.sources.-1.", b"stage."])


def _sources(folder: Path, suffix: str, seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> Target:
    """Records of a file: it is refused, or each of them is a sample or a reason."""
    path, wording = folder / f"mix{suffix}", template()
    grey(folder, 40)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        shutil.rmtree(folder / "index", ignore_errors=True)
        with suppress(*TOLD):
            dataset = open_dataset((SourceConfig(str(path), media_root=str(folder)),), CONFIG, wording, SEEN, folder / "index")
            for i in range(min(len(dataset), 20)):
                assert isinstance(dataset[i], Sample | Rejected)

    return Target(seeds, run, words)


RECORDS = [
    talk("<image>What is it?", "A cat.", images="40.png", id="a"),
    talk("Hi", "Hello \u6f22 \U0001f642", "And?", "No."),
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant", "content": "y"}]},
    talk("<video>", "z", id="7") | {"video": "f.gif", "video_range": [0, 0.2]},
]
WORDS = [
    b"[" * 2000,
    b'{"a":' * 300,
    b"]" * 50,
    b'"',
    b"\\ud800",
    b"\\u0000",
    b"null",
    b"true",
    b"NaN",
    b"-1",
    b"1e999",
    b"\n",
    b"{}",
]
WORDS += [b'"image": ["40.png", "../40.png"],', b'"set": "x",', b'"audio": "a.wav",', b"<image>", b"\xef\xbb\xbf", b"9" * 5000]


def json_lines(folder: Path) -> Target:
    return _sources(folder, ".jsonl", [b"\n".join(json.dumps(r).encode() for r in RECORDS), b"{}\n[]\n1\n"], WORDS)


def json_array(folder: Path) -> Target:
    return _sources(folder, ".json", [json.dumps(RECORDS).encode(), json.dumps(RECORDS, indent=1).encode()], WORDS)


def tar_archive(folder: Path) -> Target:
    from tests.support.archive import pack

    inside = {f"a/{i}.json": json.dumps(record).encode() for i, record in enumerate(RECORDS)}
    inside |= {"a/0.png": (folder / grey(folder, 40)).read_bytes(), "n" * 90 + ".json": b"{}"}
    seeds = [pack(folder / f"{form}.tar", inside, form).read_bytes() for form in (0, 1, 2)]
    return _sources(
        folder, ".tar", seeds, [b"-0000001 ", b"0000_100\0", b"99999 path=", b"ustar\0", b"x", b"L", b"\x80" + b"\xff" * 11]
    )


def parquet_rows(folder: Path) -> Target:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    turns = [record["conversations"] for record in RECORDS if "conversations" in record]
    parquet.write_table(pa.table({"conversations": turns, "id": ["a", "b", "c"]}), file, row_group_size=2)
    return _sources(folder, ".parquet", [file.getvalue()])


def index_sidecar(folder: Path) -> Target:
    """A damaged index is built anew: records never move."""
    source = folder / "mix.jsonl"
    source.write_bytes(b"\n".join(json.dumps(r).encode() for r in RECORDS))

    def opened() -> RecordIndex:
        return RecordIndex.open(SourceConfig(str(source)), folder / "index", SEEN)

    good = opened()
    (sidecar,) = (folder / "index").glob("*.index")
    lengths, raw = good.lengths.tolist(), [good.raw(i) for i in range(len(good))]

    def run(data: bytes) -> None:
        sidecar.unlink()
        sidecar.write_bytes(data)
        found = opened()
        assert found.lengths.tolist() == lengths and [found.raw(i) for i in range(len(found))] == raw

    return Target([sidecar.read_bytes()], run, [b'"<i8"', b'"|O"', b'"|V999999"', b"[4]", b"[-4]", b"[999999999999]", b"null"])


def measurements(folder: Path) -> Target:
    """Measured lengths are those that were written, or none."""
    lengths, bad = np.arange(40, dtype=np.int32), np.array([3, 9])
    write_measurement(folder, "mix", "0", Measurement(lengths, bad))
    (path,) = folder.glob("*.npz")

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = _read(path, 40)
        assert found is None or (found.lengths.tolist() == lengths.tolist() and found.bad.tolist() == bad.tolist())

    return Target([path.read_bytes()], run, [b"|O", b"<f8", b"<i4", b"(40,)", b"(999999999999,)", b"(-1,)", b"PK\x01\x02"])


def pictures(folder: Path) -> Target:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    seeds = [png(30_000, 30_000), png(1, 60_000)]
    for form, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {})):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        noise.save(file, form, exif=exif, **options)
        seeds.append(file.getvalue())
    return Target(
        seeds,
        _medium(folder / "x.png", MediaRef("image", "x"), image, SPEC),
        [b"IDAT", b"IHDR", b"eXIf", b"\xff\xda", b"VP8X", b"acTL"],
    )


def sounds(folder: Path) -> Target:
    quiet = tone(0.05, 8000, channels=2)
    seeds = [wav(quiet, 8000, bits) for bits in (8, 16, 24, 32)] + [
        wav(quiet, 8000, 32, is_float=True),
        wav(quiet, 8000, tag=0xFFFE),
    ]
    return Target(
        seeds, _medium(folder / "x.wav", MediaRef("audio", "x"), audio, HEARD), [b"data", b"fmt ", b"RIFF", b"LIST", b"RF64"]
    )


def animations(folder: Path) -> Target:
    seeds = [animation(greys(4, (20, 16)), 100, form) for form in ("GIF", "WEBP")]
    return Target(
        seeds, _medium(folder / "x.gif", MediaRef("video", "x"), video, SPEC), [b"\x2c", b"\x21\xf9", b"ANMF", b"ANIM", b";"]
    )


def films(folder: Path) -> Target:
    seeds = [film(greys(6)), film(greys(6), form="matroska")]
    return Target(
        seeds, _medium(folder / "x.mp4", MediaRef("video", "x"), video, SPEC), [b"moov", b"stts", b"mdat", b"elst", b"ctts"]
    )


def _medium(path: Path, ref: MediaRef, kind: Any, spec: Any) -> Callable[[bytes], None]:
    """A medium is refused, or decodes to as many rows as it was measured with."""

    def run(data: bytes) -> None:
        path.write_bytes(data)
        blob = Blob(path.name, str(path))
        with suppress(MediaError):
            kind.check(blob) if kind is not image else image.check_file(blob)
        with suppress(MediaError):
            rows = kind.load(blob, ref, spec, CONFIG, kind.measure(blob, ref, spec, CONFIG, 1))
            assert len(rows) >= 1 and bool(torch.isfinite(rows.float()).all())

    return run


def weights(folder: Path) -> Target:
    """A file of weights is refused, or every tensor in it can be read."""
    path = folder / "x.safetensors"
    write_shard_like(path)
    words = [
        b'"F32"',
        b'"F64"',
        b'"F4"',
        b'"F8_E8M0"',
        b"[0,",
        b"18446744073709551615",
        b"-1",
        b'"data_offsets":[0,4]',
        b'"__metadata__":{}',
    ]
    return Target([path.read_bytes()], _weights(path), words)


def write_shard_like(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(1)}, path)


def pickled_weights(folder: Path) -> Target:
    path = folder / "x.bin"
    seeds = []
    for zipped in (True, False):
        torch.save({"a": torch.arange(6.0), "b": torch.zeros(2, 2)}, path, _use_new_zipfile_serialization=zipped)
        seeds.append(path.read_bytes())
    return Target(
        seeds, _weights(path), [b"cos\nsystem\n", b"cbuiltins\neval\n", b"R", b".", b"\x80\x02", b"ctorch\nload\n", b"PK\x01\x02"]
    )


def _weights(path: Path) -> Callable[[bytes], None]:
    logging.disable(logging.WARNING)

    def run(data: bytes) -> None:
        path.unlink(missing_ok=True)  # the file before may still be mapped
        path.write_bytes(data)
        with suppress(ConfigError):
            for rows in read_weights(path).values():
                assert isinstance(rows, LazyTensor)
                if torch.Size(rows.shape).numel() < 1_000_000:
                    rows.all()

    return run


def manifests(folder: Path) -> Target:
    """A manifest is refused unless it is the one that was written."""
    checkpoint = _checkpoint(folder)
    good = (checkpoint / MANIFEST).read_bytes()

    def run(data: bytes) -> None:
        (checkpoint / MANIFEST).write_bytes(data)
        with suppress(UnsoundCheckpoint):
            verify(checkpoint)
            assert data == good

    return Target([good], run, [b"null", b"{}", b"[" * 2000, b"-1", b"1e999", b'"../x"', b'"/dev/zero"', b"9" * 5000])


def layouts(folder: Path) -> Target:
    """What a rank says of its shard is refused, or its tensors can be put together."""
    checkpoint = _checkpoint(folder)
    (path,) = checkpoint.glob("rank-*.json")

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(UnsoundCheckpoint, ConfigError):
            for rows in checkpoint_tensors(checkpoint).values():
                if torch.Size(rows.shape).numel() < 1_000_000:
                    rows.all()

    return Target([path.read_bytes()], run, [b"null", b"[]", b"-1", b"1e3", b'"x"', b"true", b"[" * 2000, b"9" * 30])


def states(folder: Path) -> Target:
    """The state of a checkpoint is refused, or is that of this run."""
    checkpoint, root = _checkpoint(folder), parse_config(tables(folder), "fuzz")
    state = {"config": to_tables(root), "lengths": "", "meter": {}, "optimizer_steps": {}, "step": 7}

    def run(data: bytes) -> None:
        (checkpoint / "state.json").write_bytes(data)
        with suppress(ConfigError, ProofError, UnsoundCheckpoint):
            read_state(checkpoint, root)

    return Target(
        [json.dumps(state).encode()], run, [b"null", b"[]", b"{}", b'"stage": [1],', b'"stage": [{"name": 3}],', b"[" * 2000]
    )


def _checkpoint(folder: Path) -> Path:
    target = folder / "checkpoint-7"
    target.mkdir()
    write_shard(target, 0, 1, {"weights/a": torch.arange(6.0).reshape(3, 2), "weights/b": torch.tensor(2.0)})
    (target / "state.json").write_text("{}")
    write_manifest(target, {"step": 7, "run_id": "fuzz"})
    return target


def model_configs(folder: Path) -> Target:
    """config.json of a base is refused, or describes a class of transformers."""
    seeds = [
        b'{"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 2, "auto_map": {"AutoConfig": "x.Y"}}',
        b'{"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "attn_implementation": "a/b"}',
        b'{"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}',
    ]

    def run(data: bytes) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(value, dict):
            with suppress(ConfigError):
                found = hugging_face_config("model.llm.path", value)
                assert type(found).__module__.startswith("transformers.models.") and not getattr(found, "auto_map", None)

    return Target(
        seeds, run, [b"null", b"-1", b'"bert"', b'"mixtral"', b"[]", b"{}", b'"_attn_implementation": "a/b",', b"true", b"0"]
    )


def cards(folder: Path) -> Target:
    """model.json is refused, or is a card."""
    from tests.support.finals import build, config_of, save_parts

    save_parts(folder)
    text = json.dumps(build(config_of(folder)).card.to_json()).encode()

    def run(data: bytes) -> None:
        (folder / "model.json").write_bytes(data)
        with suppress(ConfigError):
            read_card(folder)

    return Target([text], run, [b"null", b"[]", b"{}", b"-1", b'"x"', b"true", b"[" * 2000])


TARGETS: dict[str, Callable[[Path], Target]] = {
    **{"run file": run_file, "overrides": overrides, "json lines": json_lines, "json array": json_array, "tar": tar_archive},
    **{"parquet": parquet_rows, "index": index_sidecar, "measurements": measurements, "pictures": pictures, "sounds": sounds},
    **{"animations": animations, "films": films, "safetensors": weights, "bin": pickled_weights, "manifest": manifests},
    **{"layout": layouts, "state": states, "config.json": model_configs, "model.json": cards},
}


def quick_disk() -> None:
    """Files of a test need not survive a crash of the machine."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
