"""`conversion.json`, which says what a checkpoint was made of and what it consists of; comparing a folder with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import read_json
from .writer import hash_file, read_header


MANIFEST = "conversion.json"


class Check(NamedTuple):
    """What was compared: how many weight files, and whether every byte of them (or sizes and headers alone)."""

    files: int
    hashed: bool


def check_checkpoint(folder: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Check:
    """Compare the weight files of a converted checkpoint with its `conversion.json`.

    Sizes and headers (names, dtypes and shapes of the tensors) are compared; and all bytes, by their sha256, where the
    checkpoint was made with a manifest. Only that finds a changed value.

    Raises:
        FileNotFoundError: no `conversion.json`. ValueError: files are missing, changed or not listed; names them.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it was not made by expand or convert")
    recorded: Any = read_json(folder / MANIFEST).get("outputs")
    if not isinstance(recorded, dict) or not all(_is_entry(entry) for entry in recorded.values()):
        raise ValueError(f"{folder / MANIFEST} does not list the outputs with bytes and header_sha256 or sha256")
    problems, done, total = [], 0, sum(entry["bytes"] for entry in recorded.values())
    for name, entry in recorded.items():
        if problem := _difference(folder, name, entry):
            problems.append(f"{name} {problem}")
        done += entry["bytes"]
        if progress is not None:
            progress(done, total)
    strangers = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in recorded)
    problems += [f"{name} is not listed" for name in strangers]
    if problems:
        raise ValueError(f"{folder} is not what {MANIFEST} says: {'; '.join(problems)}")
    return Check(len(recorded), all("sha256" in entry for entry in recorded.values()))


def _is_entry(entry: Any) -> bool:
    hashes = {"sha256", "header_sha256"}.intersection(entry) if isinstance(entry, dict) else ()
    return bool(hashes) and isinstance(entry.get("bytes"), int)


def _difference(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"has {path.stat().st_size} bytes, not {entry['bytes']}"
    if "header_sha256" in entry and hashlib.sha256(read_header(path) or b"").hexdigest() != entry["header_sha256"]:
        return "has another header"
    if "sha256" in entry and hash_file(path) != entry["sha256"]:
        return "has another sha256"
    return None
