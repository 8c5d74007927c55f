"""Where training conversations come from: every format becomes a sequence of `Record`s, read one at a time.

    .json, .jsonl   LLaVA / InternVL records  {"id", "image": str | [str], "conversations": [{"from", "value"}]}
                    or chat records           {"messages": [{"role", "content"}], "images": [..]}
    .json           an InternVL meta file     {name: {"root", "annotation", "repeat_time", "max_dynamic_patch", ..}}
    a folder        a `datasets` data set saved with `save_to_disk`, with the columns of either kind of record

A file is never held in memory: a .jsonl is read by the offsets of its lines, a data set by Arrow's memory map (a .json
has to be read at once). Video frames are pictures in a list; `max_tiles: 1` keeps them to a tile each.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..modeling_mono_internvl import place_images


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSample(ValueError):
    """A record that cannot be learnt from; the message names the file, the line or place, and the reason."""


class Record(NamedTuple):
    """One conversation. `messages` are chat messages whose pictures are paths or PIL images; `where` names it.

    `finish`, called with the encoded example and the processor, may add targets to it.
    """

    messages: list[dict[str, Any]]
    where: str
    max_tiles: int | None = None
    finish: Callable[[dict[str, Any], Any], None] | None = None


class Records(Protocol):
    """What a source offers. `ordered`: read in its own order, not shuffled."""

    name: str
    ordered: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True)
class Source:
    """Records and how often they are drawn: `repeat` times their number, or a `weight` beside other weights."""

    records: Records
    repeat: float = 1.0
    weight: float | None = None


class FileRecords:
    """Records of one .json, .jsonl or saved `datasets` folder.

    Args:
        root: folder of the pictures; default: the file's own.
        max_tiles: most tiles of a picture of this source.
        content: of a .json that was parsed already.

    Raises:
        FileNotFoundError: no such file, or no such picture folder.
        ValueError: the file is empty or not of a known form.
    """

    ordered = False

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        max_tiles: int | None = None,
        content: Any = None,
    ):
        self.path, self.name, self.max_tiles = Path(path), str(path), max_tiles
        self.root = Path(root) if root is not None else self.path.parent
        if not self.path.exists():
            raise FileNotFoundError(f"no data file {path}")
        if not self.root.is_dir():
            raise FileNotFoundError(f"{path}: its picture folder {self.root} does not exist")
        self._rows: Any = None
        self._offsets: np.ndarray | None = None
        if self.path.is_dir():
            from datasets import load_from_disk

            self._rows = load_from_disk(str(self.path))
            if isinstance(self._rows, dict):
                raise ValueError(f"{path} holds the splits {', '.join(self._rows)}; name the folder of one")
        elif self.path.suffix == ".jsonl":
            self._offsets = _line_offsets(self.path)
        elif self.path.suffix == ".json":
            self._rows = _read_json(self.path) if content is None else content
            if not isinstance(self._rows, list):
                raise ValueError(f"{path}: expected a list of records, found {type(self._rows).__name__}")
        else:
            raise ValueError(f"{path}: unknown kind of data; allowed are .json, .jsonl and a saved data set's folder")
        if not len(self):
            raise ValueError(f"{path} holds no record")

    def __len__(self) -> int:
        return len(self._rows) if self._offsets is None else len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        if self._offsets is None:
            row, where = self._rows[index], f"{self.name}, record {index}"
        else:
            where = f"{self.name}, line {self._offsets[index][0]}"
            with open(self.path, "rb") as file:
                file.seek(self._offsets[index][1])
                line = file.readline()
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadSample(f"{where}: not JSON ({error})") from error
        if not isinstance(row, Mapping):
            raise BadSample(f"{where}: a record is a mapping, not {type(row).__name__}")
        if row.get("id") is not None:
            where += f" (id {row['id']})"
        return Record(read_messages(row, self.root, where), where, self.max_tiles)


def open_sources(specs: Sequence[Any]) -> list[Source]:
    """The sources of a recipe's `data`: paths, mappings with `path`, and meta files, whose entries are one each.

    Raises:
        FileNotFoundError, ValueError: what is missing or not understood, by name.
    """
    sources: list[Source] = []
    for spec in specs:
        spec = {"path": spec} if isinstance(spec, (str, Path)) else dict(spec)
        allowed = ("path", "root", "max_tiles", "repeat", "weight")
        unknown = [key for key in spec if key not in allowed]
        if "path" not in spec or unknown:
            raise ValueError(f"data: {spec}: needs a path, and knows {', '.join(allowed)}")
        path = Path(spec["path"])
        repeat, weight = float(spec.get("repeat", 1)), spec.get("weight")
        if repeat <= 0 or (weight is not None and weight <= 0):
            raise ValueError(f"data: {path}: repeat and weight must be positive")
        content = _read_json(path) if path.suffix == ".json" and path.is_file() else None
        if not isinstance(content, dict):
            records = FileRecords(path, spec.get("root"), spec.get("max_tiles"), content)
            sources.append(Source(records, repeat, weight))
            continue
        for name, entry in _meta_entries(path, content).items():
            missing = [key for key in ("root", "annotation") if key not in entry]
            if missing:
                raise ValueError(f"{path}: the entry {name!r} lacks {', '.join(missing)}")
            records = FileRecords(
                _beside(path, entry["annotation"]), _beside(path, entry["root"]), entry.get("max_dynamic_patch")
            )
            declared = entry.get("length")
            if declared is not None and declared != len(records):
                raise ValueError(f"{path}: {name!r} declares {declared} records, {records.name} holds {len(records)}")
            sources.append(Source(records, repeat * float(entry.get("repeat_time", 1)), weight))
    return sources


def read_messages(row: Mapping[str, Any], root: Path, where: str) -> list[dict[str, Any]]:
    """A record of either kind as chat messages.

    As the released training code reads them: texts are stripped, and an answer in front of the first question is
    dropped.

    Raises:
        BadSample: it is of neither kind, or its `<image>` marks and pictures differ in number.
    """
    turns = row.get("conversations")
    if turns is None:
        turns = row.get("messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadSample(f"{where}: no conversations or messages")
    pictures = list(_pictures(row, root))
    marks = 0
    messages: list[dict[str, Any]] = []
    for turn in turns:
        who = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if who not in ROLES:
            raise BadSample(f"{where}: unknown speaker {who!r}; allowed are {', '.join(ROLES)}")
        if isinstance(text, Sequence) and not isinstance(text, str):
            marks += sum(part.get("type") == "image" for part in text)
            text = "".join("<image>" if part.get("type") == "image" else part.get("text") or "" for part in text)
        elif isinstance(text, str):
            marks += text.count("<image>") if ROLES[who] == "user" else 0
        else:
            raise BadSample(f"{where}: a turn of {who} has no text")
        messages.append({"role": ROLES[who], "content": text.strip()})
    if messages[0]["role"] == "assistant":
        messages = messages[1:]
    if marks == 0 and pictures:
        # Without a mark pictures come first, as in `chat`.
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadSample(f"{where}: {len(pictures)} pictures and no user's turn")
        first["content"] = place_images(first["content"], len(pictures))
    elif marks != len(pictures):
        raise BadSample(f"{where}: {marks} <image> marks for {len(pictures)} pictures")
    left = iter(pictures)
    for message in messages:
        if message["role"] != "user" or "<image>" not in message["content"]:
            continue
        first_text, *others = message["content"].split("<image>")
        parts: list[dict[str, Any]] = [{"type": "text", "text": first_text}]
        for text in others:
            parts += [{"type": "image", "image": next(left)}, {"type": "text", "text": text}]
        message["content"] = parts
    return messages


def _pictures(row: Mapping[str, Any], root: Path) -> Iterator[Any]:
    found = row.get("image", row.get("images"))
    if found is None:
        return
    for picture in [found] if isinstance(found, (str, Mapping)) or not isinstance(found, Sequence) else found:
        if isinstance(picture, Mapping):
            # The `datasets` library's undecoded pictures, and ms-swift's records.
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, str) and "://" not in picture:
            picture = str(root / picture)
        yield picture


def _line_offsets(path: Path) -> np.ndarray:
    """int64 [records, 2]: number (from 1) and byte offset of each line that is not empty."""
    found, offset = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                found.append((number, offset))
            offset += len(line)
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _meta_entries(path: Path, content: dict[str, Any]) -> dict[str, dict]:
    """The entries of an InternVL meta file."""
    if not content or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"{path}: a meta file maps names to {{root, annotation, ..}}")
    return content


def _beside(meta: Path, path: str) -> Path:
    """Meta files name paths from where training runs, or from where they lie."""
    return Path(path) if Path(path).exists() or Path(path).is_absolute() else meta.parent / path
