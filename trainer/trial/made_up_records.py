"""Records and media in place of sources whose files are not there: of the kinds that the parts of the model read."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from model.files.untrusted import Json

NUM_RECORDS = 8
_WORDS = {
    "video": r"video|film|clip(?!_)|movie",
    "audio": r"audio|speech|sound|voice|transcript|asr|wav|negative|duplex",
    "": r"text",
}
"""Words of a path that tell which media its records have."""


def kinds_of(source: Json, read: Collection[str]) -> tuple[str, ...]:
    """Guess which media the records of a source have: those that its folders of media and its name tell, of the kinds `read`.

    "" stands for text alone.
    """
    root = source.get("media_root") or ""
    if isinstance(root, dict):
        kinds = [kind for kind in ("image", "video", "audio") if kind in root]
    elif not root:
        kinds = []
    else:
        words = f"{source.get('path', '')} {source.get('name', '')} {root}".lower()
        kinds = [kind for kind in ("video", "audio") if re.search(_WORDS[kind], words)] or ["image"]
    kinds = [kind for kind in kinds if ("image" if kind == "video" else kind) in read]
    return tuple(kinds) or ("",)


def make_source(folder: Path, name: str, kinds: tuple[str, ...], num_states: int) -> Json:
    """Write records with these media in turn, and the media, into `folder`; return the source as a table of run.toml.

    `num_states`: classes of the user's state that clips name; 0 = they name none.
    """
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(NUM_RECORDS):
        kind = kinds[i % len(kinds)]
        turns = [{"from": "human", "value": f"<{kind}>\n" * bool(kind) + "What is this?"}, {"from": "gpt", "value": f"It is {i}."}]
        record: Json = {"conversations": turns}
        if kind:
            record[kind] = _make_medium(media, kind, i)
        if kind == "audio" and num_states:
            record["audio_state"] = i % num_states
        lines.append(json.dumps(record))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return {"path": str(path), "name": name, "media_root": str(media)}


def _make_medium(folder: Path, kind: str, i: int) -> str:
    """Write the i-th medium of a kind unless it is there; return its name in `folder`."""
    rng = np.random.default_rng(i)
    name = {"image": f"{i}.png", "video": f"{i}_film", "audio": f"{i}.wav"}[kind]
    if (folder / name).exists():
        return name
    if kind == "audio":
        with wave.open(str(folder / name), "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(16_000)
            out.writeframes(rng.integers(-3000, 3000, 16_000 + 4000 * (i % 3), dtype=np.int16).tobytes())
        return name
    frames = [folder / name] if kind == "image" else [folder / name / f"{k}.png" for k in range(2)]
    for file in frames:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (240, 320 + 40 * (i % 3))
        Image.fromarray(rng.integers(0, 256, (*(side // 8 for side in shape), 3), dtype=np.uint8)).resize(shape[::-1]).save(file)
    return name
