"""Where training conversations come from: every format becomes a sequence of `Record`s, read one at a time.

    .json, .jsonl   records of any form that `training.records` knows: a list, or one a line (whatever the name)
    .json           an InternVL meta file     {name: {"root", "annotation", "repeat_time", "max_dynamic_patch", ..}}
    .parquet, a folder of `save_to_disk`      a `datasets` data set with the columns of such records

A file is never held in memory: lines are read by their offsets, a data set by Arrow's memory map (a .json list has to
be read at once).
"""

import codecs
import dataclasses
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..common.record import Record
from .records import FORMS, BadSample, count_marks, is_empty, read_record


logger = logging.getLogger(__name__)

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Keys of an InternVL meta entry. The second are for what is not done here: named where they ask for something.
_META_KEYS = ("root", "annotation", "max_dynamic_patch", "repeat_time", "length")
_META_OFF = ("data_augment",)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Whatever goes wrong while a record is read becomes a `BadSample` that names it.

    Every exception: a `StopIteration` from a record would end an epoch, an `IndexError` a loop, a `GeneratorExit` the
    generator that reads, without a word.
    """
    try:
        yield
    except BadSample:
        raise
    except (Exception, GeneratorExit) as error:
        plain = isinstance(error, (ValueError, OSError)) and str(error)
        raise BadSample(f"{where}: {error if plain else repr(error)}") from error


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
        ignore: keys of its records that are not read.

    Raises:
        FileNotFoundError: no such file, or no such picture folder.
        ValueError: the file is empty, not UTF-8 or not of a known form.
    """

    ordered = False

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        max_tiles: int | None = None,
        ignore: Collection[str] = (),
    ):
        self.path, self.name, self.max_tiles = Path(path).expanduser(), str(path), max_tiles
        self.ignore = frozenset(ignore)
        self.root = Path(root).expanduser() if root is not None else self.path.parent
        if not self.path.exists():
            raise FileNotFoundError(f"no data file {path}")
        if not self.root.is_dir():
            raise FileNotFoundError(f"{path}: its picture folder {self.root} does not exist")
        self._rows: Any = None
        self._offsets: np.ndarray | None = None
        self._told: set[str] = set()
        kind = self.path.suffix.lower()
        if self.path.is_dir():
            from datasets import load_from_disk

            self._rows = load_from_disk(str(self.path))
            if isinstance(self._rows, dict):
                raise ValueError(f"{path} holds the splits {', '.join(self._rows)}; name the folder of one")
        elif kind == ".parquet":
            self._rows = _read_parquet(self.path)
        elif kind == ".jsonl":
            self._offsets = _line_offsets(self.path)
        elif kind == ".json":
            content = _read_json(self.path)
            if isinstance(content, _Twice):
                raise ValueError(f"{path}: {content.message}")
            if content is None:
                self._offsets = _line_offsets(self.path)
            else:
                self._rows = [content] if _is_record(content) else content
                if not isinstance(self._rows, list):
                    raise ValueError(
                        f"{path}: expected a list of records or one record, found {type(content).__name__}"
                        + (f" with {', '.join(map(str, content))}"[:200] if isinstance(content, dict) else "")
                    )
        else:
            raise ValueError(
                f"{path}: unknown kind of data; allowed are .json, .jsonl, .parquet and a saved data set's folder"
            )
        if not len(self):
            raise ValueError(f"{path} holds no record")

    def __len__(self) -> int:
        return len(self._rows) if self._offsets is None else len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} holds {len(self)} records, not one of number {index}")
        row, where = self.row(index)
        with reading(where):
            messages = read_record(row, self.root, self.ignore)
            if count_marks(messages):
                # Strings that hold a mark have become parts where a picture is given.
                self._tell(where, "a question holds <image> and the record gives no picture: there it is a word")
            category = None if "category" in self.ignore else row.get("category")
            category = category if isinstance(category, str) and category else None
            return Record(self._from_a_question(messages, where), where, self.max_tiles, category=category)

    def row(self, index: int) -> tuple[Any, str]:
        """A record as it lies there, and its name.

        Raises:
            BadSample: it cannot be read.
        """
        where = f"{self.name}, record {index}"
        if self._offsets is not None:
            where = f"{self.name}, line {self._offsets[index][0]}"
        with reading(where):
            if self._offsets is None:
                row = self._rows[int(index)]
            else:
                row = _parse_line(self.path, int(self._offsets[index][1]), where)
            twice = _find_twice(row)
            if twice:
                raise ValueError(twice.message)
        if isinstance(row, Mapping) and not is_empty(row.get("id")):
            where += f" (id {row['id']})"
        return row, where

    def _from_a_question(self, messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
        """As the released training code: an answer in front of the first question is not part of it."""
        start = sum(message["role"] == "system" for message in messages[:1])
        if len(messages) > start and messages[start]["role"] == "assistant":
            self._tell(where, "an answer before the first question is left out, as the released code does")
            return [*messages[:start], *messages[start + 1 :]]
        return messages

    def _tell(self, where: str, what: str) -> None:
        if what not in self._told:
            logger.warning("%s: %s (told once for this source)", where, what)
            self._told.add(what)


def open_sources(specs: Sequence[Any]) -> list[Source]:
    """The sources of a recipe's `data`: paths, mappings with `path`, and meta files, whose entries are one each.

    Raises:
        FileNotFoundError, ValueError: what is missing or not understood, by name.
    """
    sources: list[Source] = []
    for spec in specs:
        spec = {"path": spec} if isinstance(spec, (str, Path)) else spec
        allowed = ("path", "root", "max_tiles", "repeat", "weight", "ignore")
        if not isinstance(spec, Mapping) or set(spec) - set(allowed) or not isinstance(spec.get("path"), (str, Path)):
            raise ValueError(f"data: {spec}: a path is wanted, or a mapping with path that knows {', '.join(allowed)}")
        path = Path(spec["path"]).expanduser()
        ignore = [spec["ignore"]] if isinstance(spec.get("ignore"), str) else spec.get("ignore") or ()
        if not isinstance(ignore, (list, tuple, set, frozenset)):
            raise ValueError(f"data: {path}: ignore: a list of keys is wanted, not {ignore!r}")
        repeat = _positive(spec.get("repeat", 1), f"data: {path}: repeat")
        weight = None if spec.get("weight") is None else _positive(spec["weight"], f"data: {path}: weight")
        max_tiles = _tiles(spec.get("max_tiles"), f"data: {path}: max_tiles")
        content = _read_json(path) if path.suffix.lower() == ".json" and path.is_file() else None
        if not isinstance(content, dict) or _is_record(content):
            sources.append(Source(FileRecords(path, spec.get("root"), max_tiles, ignore), repeat, weight))
            continue
        if spec.get("root") is not None:
            raise ValueError(f"data: {path}: root: each entry of a meta file names its own")
        found = []
        for name, entry in _meta_entries(path, content).items():
            where = f"{path}: {name!r}"
            records = FileRecords(
                _beside(path, entry["annotation"]),
                _beside(path, entry["root"]),
                _least(max_tiles, _tiles(entry.get("max_dynamic_patch"), f"{where}: max_dynamic_patch")),
                ignore,
            )
            declared = entry.get("length")
            if declared is not None and declared != len(records):
                raise ValueError(f"{where} declares {declared} records, {records.name} holds {len(records)}")
            found.append(Source(records, repeat * _positive(entry.get("repeat_time", 1), f"{where}: repeat_time")))
        # The weight is the file's: its entries share it as they would share a run of their own.
        size = sum(len(source.records) * source.repeat for source in found)
        for source in found:
            share = None if weight is None else weight * len(source.records) * source.repeat / size
            sources.append(dataclasses.replace(source, weight=share))
    return sources


def _positive(value: Any, name: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return number


def _tiles(value: Any, name: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _least(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _check_encoding(path: Path, start: bytes) -> None:
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is packed ({name}): unpack it first")
    if start.startswith(_UTF16) or b"\0" in start[:4]:
        raise ValueError(f"{path} is UTF-16 or UTF-32, not UTF-8: save it as UTF-8 (PowerShell: -Encoding utf8)")


def _line_offsets(path: Path) -> np.ndarray:
    """int64 [records, 2]: number (from 1) and byte offset of each line that is not empty."""
    found, offset = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _check_encoding(path, line[:8])
            if line.removeprefix(codecs.BOM_UTF8).strip():
                found.append((number, offset))
            offset += len(line)
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _parse_line(path: Path, offset: int, where: str) -> Any:
    with open(path, "rb") as file:
        file.seek(offset)
        line = file.readline()
    try:
        return _parse(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from error
    except ValueError as error:
        raise BadSample(f"{where}: not JSON ({error})") from error


class _Twice:
    """An object of a file that gives a key twice, of which JSON would keep the last."""

    def __init__(self, key: str):
        self.message = f"the key {key!r} stands twice in one object"


def _parse(text: str) -> Any:
    """The text's JSON, with a `_Twice` in place of an object that gives a key twice: who knows the record tells it."""

    def once(pairs: list[tuple[str, Any]]) -> Any:
        held = dict(pairs)
        if len(held) == len(pairs):
            return held
        keys = [key for key, _ in pairs]
        return _Twice(next(key for place, key in enumerate(keys) if key in keys[:place]))

    return json.loads(text, object_pairs_hook=once)


def _find_twice(value: Any) -> _Twice | None:
    if isinstance(value, _Twice):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for found in map(_find_twice, inner) if found), None)


def _read_json(path: Path) -> Any:
    """What the file holds; null where it holds a JSON object a line."""
    data = path.read_bytes()
    _check_encoding(path, data[:8])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    try:
        return _parse(text)
    except (ValueError, RecursionError) as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        try:
            if isinstance(_parse(first), (dict, _Twice)):
                return None
        except (ValueError, RecursionError):
            pass
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_parquet(path: Path) -> Any:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ValueError(f"{path}: .parquet is read with `datasets`: pip install datasets") from error
    try:
        return Dataset.from_parquet(str(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read as .parquet: {error.__cause__ or error}") from error


def _is_record(content: Any) -> bool:
    """Whether a parsed .json is one record, not a meta file."""
    keys = {key for needed, _ in FORMS.values() for key in needed}
    return isinstance(content, dict) and any(not isinstance(content.get(key, {}), dict) for key in keys)


def _meta_entries(path: Path, content: dict[str, Any]) -> dict[str, dict]:
    """The entries of an InternVL meta file."""
    twice = _find_twice(content)
    if twice:
        raise ValueError(f"{path}: {twice.message}")
    if not content or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"{path}: a meta file maps names to {{root, annotation, ..}}")
    for name, entry in content.items():
        for key in ("root", "annotation"):
            if not isinstance(entry.get(key), str):
                raise ValueError(f"{path}: the entry {name!r} lacks {key}")
        for key, value in entry.items():
            if key in _META_OFF and value:
                raise ValueError(f"{path}: {name!r}: {key}: pictures are not augmented here; set it to false")
            if key not in (*_META_KEYS, *_META_OFF) and not is_empty(value):
                raise ValueError(f"{path}: {name!r}: unknown key {key!r}; allowed are {', '.join(_META_KEYS)}")
    return content


def _beside(meta: Path, path: str) -> Path:
    """Meta files name paths from where training runs, or from where they lie."""
    return Path(path) if Path(path).exists() or Path(path).is_absolute() else meta.parent / path
