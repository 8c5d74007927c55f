"""Small files, read and written whole. Here, below every other room, because a tokenizer's folder needs them too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` with the same ending, renamed to `path` when the block succeeds."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file that holds an object (`kind` list: an array).

    Raises:
        ValueError: it does not; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else "array"
        raise ValueError(f"{path} must hold a JSON {wanted}, not {type(content).__name__}")
    return content


def write_json(path: Path, content: Any, *, indent: int = 2) -> Path:
    """UTF-8 with the same line ends everywhere; a reader never sees half a file.

    Raises:
        OSError: it cannot be written; names the file.
    """
    try:
        with written_whole(path) as temporary:
            text = json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
            temporary.write_bytes(text.encode("utf-8"))
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error
    return path
