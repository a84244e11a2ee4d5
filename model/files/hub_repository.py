"""Look-ups of hub ids: one per id and revision and process, and a quick answer where the hub cannot be reached."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from model.errors import ConfigError
from model.files.untrusted import Json

SECONDS = 3.0
"""Longest wait for an answer of the hub. The library's own retries take 25 seconds for every file that is asked for."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """Answer of the hub about an id: the commit that all its files are read at, and their names. Neither without the hub."""

    commit: str | None = None
    files: frozenset[str] | None = None
    unreachable: str = ""  # why the hub was not asked or did not answer: files come from the cache


_looked_up: dict[str, Repository] = {}


def look_up(setting: str, name: str, revision: str | None, cache_dir: str = "") -> Repository:
    """Return what the hub says of `name` (owner/name) at `revision`; asked once per process.

    Where it cannot be reached, this process asks for nothing any more, as with HF_HUB_OFFLINE=1, and files come from the cache.
    Raises `ConfigError` for an id or a revision that there is not, and where the cache does not hold it either.
    """
    key = f"{name}@{revision or ''}"
    if key not in _looked_up:
        _looked_up[key] = _asked(setting, name, revision)
    found = _looked_up[key]
    if found.unreachable and not _is_cached(name, cache_dir):
        raise ConfigError(
            f"{setting} = {name + (f'@{revision}' if revision else '')!r}: no folder has this name, the hub cannot be reached "
            f"({found.unreachable}), and {cache_dir or constants.HF_HUB_CACHE} does not hold it: name a folder, or a "
            "model.cache_dir that holds it; with HF_HUB_OFFLINE=1 only the cache is asked"
        )
    return found


def _asked(setting: str, name: str, revision: str | None) -> Repository:
    """Ask the hub, or find that it cannot be reached."""
    if constants.HF_HUB_OFFLINE:
        return Repository(unreachable="HF_HUB_OFFLINE is set")
    try:
        found = HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        private = "no such id, or a private one, which needs `hf auth login`"
        what = private if isinstance(error, RepositoryNotFoundError) else "no such revision"
        raise ConfigError(
            f"{setting} = {name + (f'@{revision}' if revision else '')!r} is neither a folder nor a hub id that can be read: {what}"
        ) from error
    except HfHubHTTPError as error:  # it answers, though not this: the library says what is wrong when it asks for a file
        log.warning("%s = %r: %s", setting, name, str(error).strip().splitlines()[0])
        return Repository()
    except Exception as error:  # transport errors of httpx or requests, by the version of the library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("the hub cannot be reached (%s): its files come from the cache; HF_HUB_OFFLINE=1 says so at once", reason)
        constants.HF_HUB_OFFLINE = True
        return Repository(unreachable=reason)
    return Repository(found.sha, frozenset(file.rfilename for file in found.siblings or ()) or None)


def _is_cached(name: str, cache_dir: str) -> bool:
    """Tell whether a cache folder holds some commit of an id."""
    folder = Path(cache_dir or constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return folder.is_dir() and any(folder.iterdir())


def known_look_ups() -> Json:
    """Return everything that was looked up, as JSON."""
    return {key: [at.commit, None if at.files is None else sorted(at.files), at.unreachable] for key, at in _looked_up.items()}


def adopt_look_ups(found: Json) -> None:
    """Take what another rank has looked up: all ranks read the same commit, and none asks again."""
    for key, (commit, files, unreachable) in found.items():
        _looked_up[key] = Repository(commit, None if files is None else frozenset(files), unreachable)
        if unreachable:
            constants.HF_HUB_OFFLINE = True
