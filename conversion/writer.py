"""Carrying a plan out: shard after shard into a folder beside the destination, which is renamed at the end. Where the
destination is there already it is written into: the folder is inside, and its files move up at the end.

The temporary folder's name holds a key of the source (names, sizes and times of its files) and of all options, so that
the same command finds its own unfinished work, and another source starts from the beginning. `progress.json` in it
lists finished shards; a shard counts as finished once it is on the disk (fsync) under its name. On a restart it is kept
if its size and its header are those that would be written now. What changed between the two is not seen: only a
manifest, which hashes every file, finds that, and then finished shards are hashed again on a restart too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..common.files import read_json
from .plan import Output, Plan, produce
from .source import SAFETENSORS_DTYPES, Checkpoint


logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PROGRESS, _LOCK, _MOVING = "progress.json", ".lock", "moving.json"
_READ_BYTES = 8 << 20
# That of the safetensors library.
_LONGEST_HEADER = 100_000_000
# Threads that sync and hash shards while later ones are written; beyond this the disk is the limit.
_FINISHERS = min(os.cpu_count() or 1, 8)
# Room for what lies beside the weights.
_OTHER_FILES_BYTES = 64 << 20
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# (bytes done, bytes in all)
Progress = Callable[[int, int], None]


def parse_size(size: int | str) -> int:
    """`2GB`, `500MB`, `1GiB` or a number of bytes.

    Raises:
        ValueError: not one of them, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size={size!r} must be a positive number of bytes, or such as 2GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


# --------------------------------------------------------------------------------------------------------------- folder


# What a volume may hold when it is empty.
_OF_THE_SYSTEM = {"lost+found"}


def check_destination(destination: Path) -> None:
    """Refuse, before any work, a folder that holds something or cannot be made.

    A folder that is there (a mount point, the current folder, what a link points to) is written into.

    Raises:
        FileExistsError: it is a file, or not empty.
        FileNotFoundError: a link to nothing. NotADirectoryError: one of its parents is a file.
        OSError: nothing can be written there (read-only, no permission), or a name is too long.
    """
    try:
        place = _place(destination)
        if destination.is_symlink() and not place.exists():
            raise FileNotFoundError(f"{destination} is a link to {place}, which does not exist")
        ancestor = next(path for path in (place, *place.parents) if os.path.lexists(path))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _too_long(destination) from error
        raise
    if not ancestor.is_dir():
        if ancestor == place:
            raise FileExistsError(f"{destination} is a file; the destination is a folder")
        raise NotADirectoryError(f"{destination} cannot be written: {ancestor} is a file")
    if any(len(os.fsencode(part)) > _longest_name(ancestor) for part in place.parts):
        raise _too_long(destination)
    if place.is_dir():
        _check_empty(place, destination, None)
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise OSError(f"{destination} cannot be written: {error.strerror or error} ({ancestor})") from error


def expand_user(path: str | os.PathLike[str]) -> Path:
    """A path with `~` resolved.

    Raises:
        ValueError: it is empty, or there is no such home.
    """
    if not os.fspath(path):
        raise ValueError("the path of the destination is empty")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such home folder") from error


def _place(destination: Path) -> Path:
    return Path(os.path.realpath(destination))


def _longest_name(folder: Path) -> int:
    return os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255


def _too_long(destination: Path) -> OSError:
    return OSError(f"{destination} cannot be written: its name is longer than the file system allows")


def _check_empty(place: Path, destination: Path, work: Path | None) -> None:
    """Nothing is in a folder but unfinished work: of any run, or, once it is known, in `work` alone."""
    inside = {path for path in place.iterdir() if path.name not in _OF_THE_SYSTEM}
    partial = {path for path in inside if path.name.startswith(".") and path.name.endswith(".partial")}
    moved = {place / name for path in ([work] if work else partial) for name in _being_moved(path)}
    if others := sorted(inside - partial - moved):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise FileExistsError(f"{destination} is not empty (it holds {others[0].name}{more})")


def _being_moved(work: Path) -> list[str]:
    """Files of a finished run that was interrupted while they were moved into the destination."""
    return list(read_json(work / _MOVING)["files"]) if (work / _MOVING).is_file() else []


def _nearest_folder(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _work_folder(place: Path, key: str) -> Path:
    """Inside a folder that is there, which may be another file system or somebody's current folder; else beside it."""
    if place.is_dir():
        return place / f".{key}.partial"
    ending = f".{key}.partial"
    longest = _longest_name(_nearest_folder(place)) - len(ending)
    stem = place.name
    if len(os.fsencode(stem)) > longest:
        mark = "~" + hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
        stem = os.fsencode(stem)[: longest - len(mark)].decode(errors="ignore") + mark
    return place.with_name(stem + ending)


def job_key(source: Checkpoint, *facts: Any) -> str:
    """Changes with the source's files (name, size, time), the options and the plan."""
    states = _file_states(path for path in sorted(source.folder.iterdir()) if path.is_file())
    return hashlib.sha256(repr((states, *facts)).encode()).hexdigest()[:12]


def _file_states(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(name, bytes, nanoseconds of the last change): what tells a changed file without reading it."""
    return [(path.name, status.st_size, status.st_mtime_ns) for path in paths if (status := path.stat())]


@contextmanager
def temporary_folder(destination: Path, key: str, nbytes: int) -> Iterator[Path]:
    """A folder in or beside `destination` for `nbytes` of weights; left as it is when the block fails, to be resumed.

    Raises:
        OSError: not enough space; says how much is needed. Or another process is at the same work.
    """
    place = _place(destination)
    folder = _work_folder(place, key)
    _warn_of_stale_work(place, folder)
    if place.is_dir():
        _check_empty(place, destination, folder)
    there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
    needed = max(nbytes - there, 0) + _OTHER_FILES_BYTES
    free = shutil.disk_usage(_nearest_folder(place)).free
    if free < needed:
        raise OSError(f"not enough disk for {destination}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / _LOCK, timeout=0):
            # Taken back, so that all is checked again and goes the usual way.
            for name in _being_moved(folder):
                if (place / name).exists():
                    (place / name).replace(folder / name)
            (folder / _MOVING).unlink(missing_ok=True)
            yield folder
    except Timeout as error:
        raise OSError(f"another process is writing {destination} (in {folder})") from error


def _warn_of_stale_work(place: Path, folder: Path) -> None:
    beside = [path for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    start = "." if folder.parent == place else f"{place.name}."
    for stale in sorted(path for path in beside if path.name.startswith(start) and path.name.endswith(".partial")):
        if stale != folder:
            logger.warning("%s is left from an interrupted run with another source or other options", stale)


def publish_folder(folder: Path, destination: Path) -> None:
    """Make the finished temporary folder the destination, durably."""
    place = _place(destination)
    for path in folder.iterdir():
        if path.is_file():
            _fsync(path)
    if folder.parent == place:
        # `config.json` last: without it nothing takes the folder for a model.
        names = [path.name for path in folder.iterdir() if path.name not in (_PROGRESS, _LOCK)]
        write_json(folder / _MOVING, {"files": names})
        for name in sorted(names, key=lambda name: (name == "config.json", name)):
            (folder / name).replace(place / name)
        for name in (_PROGRESS, _LOCK, _MOVING):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
        _fsync(place)
    else:
        for name in (_PROGRESS, _LOCK):
            (folder / name).unlink(missing_ok=True)
        _fsync(folder)
        folder.rename(place)
        _fsync(place.parent)


@contextmanager
def naming(path: Path, folder: Path | None = None) -> Iterator[None]:
    """What the disk refuses names the file; the system's own errors of reading and writing do not.

    `folder`: work that stays there, for the message; without a file of its own, the last one touched is named.

    Raises:
        OSError: with the system's number, the file and the reason.
    """
    try:
        yield
    except OSError as error:
        given = [Path(name) for name in (error.filename2, error.filename) if isinstance(name, (str, os.PathLike))]
        ours = next((name for name in given if folder is not None and name.is_relative_to(folder)), None)
        if error.errno is None or (given and ours is None):
            raise
        raise _named(ours or path, folder, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        # tokenizers raises bare Exceptions
        found = re.search(r"(.*)\(os error (\d+)\)", str(error))
        if type(error) is not Exception or not found:
            raise
        raise _named(path, folder, int(found[2]), found[1].strip()) from error


def _named(path: Path, folder: Path | None, number: int, reason: str) -> OSError:
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
        path = max(files, key=lambda file: file.stat().st_mtime_ns, default=path)
    kept = f"; what is finished stays in {folder}, and the same command goes on with it" if folder else ""
    return OSError(number, f"{path}: {reason}{kept}")


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """As `common.files` does, but synced, and under a temporary name that the next run writes anew."""
    temporary = path.with_name(path.name + ".part")
    with naming(temporary):
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _fsync(temporary)
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------------------- shards


def hash_file(path: Path) -> str:
    """sha256 of a file as hexadecimal digits."""
    digest, buffer = hashlib.sha256(), bytearray(_READ_BYTES)
    with naming(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def split_into_shards(plan: Plan, max_bytes: int) -> dict[str, list[Output]]:
    """File name -> outputs, in order; a tensor larger than `max_bytes` has a file of its own."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in plan.outputs:
        if groups[-1] and size + output.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


class _Finished:
    """`progress.json`: finished shards, as {file: {bytes, not_finite, ..}} (`describe`)."""

    def __init__(self, folder: Path, shards: dict[str, list[Output]], manifest: bool):
        self.path, self.manifest, self._lock = folder / _PROGRESS, manifest, threading.Lock()
        self.shards: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            recorded = {name: entry for name, entry in read_json(self.path).items() if name in shards}
            with ThreadPoolExecutor(_FINISHERS) as pool:
                whole = pool.map(lambda name: self._is_whole(folder / name, shards[name], recorded[name]), recorded)
                self.shards = {name: recorded[name] for name, kept in zip(recorded, whole, strict=True) if kept}

    def _is_whole(self, path: Path, outputs: list[Output], entry: dict[str, Any]) -> bool:
        header = _header(outputs)
        if not path.is_file() or path.stat().st_size != len(header) + sum(output.nbytes for output in outputs):
            return False
        if read_header(path) != header:
            return False
        return not self.manifest or hash_file(path) == entry.get("sha256")

    def add(self, temporary: Path, path: Path, not_finite: list[str]) -> None:
        """Sync, rename and record a shard that was written under a temporary name; with a manifest also hash it."""
        with naming(temporary, self.path.parent):
            _fsync(temporary)
        entry = {**describe(temporary, self.manifest), "not_finite": not_finite}
        with self._lock:
            temporary.replace(path)
            self.shards[path.name] = entry
            write_json(self.path, self.shards)


def describe(path: Path, manifest: bool) -> dict[str, Any]:
    """{bytes} of a file, of a safetensors file also header_sha256, with a manifest also sha256."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    header = read_header(path) if path.suffix in (".safetensors", ".part") else None
    if header is not None:
        entry["header_sha256"] = hashlib.sha256(header).hexdigest()
    return {**entry, **({"sha256": hash_file(path)} if manifest else {})}


def write_shards(
    plan: Plan, source: Checkpoint, folder: Path, max_bytes: int, progress: Progress | None, manifest: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Write the plan's shards that are not finished, and the index.

    Returns:
        Inputs and outputs as {file: what `describe` says}; outputs also have `not_finite`, names of tensors with NaN or
        infinite values.

    Raises:
        OSError: the disk refuses, or a weight file of the source was changed meanwhile; named.
    """
    shards = split_into_shards(plan, max_bytes)
    finished = _Finished(folder, shards, manifest)
    states = _file_states(source.files)
    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        if progress is not None:
            progress(done, plan.nbytes)

    with ThreadPoolExecutor(_FINISHERS) as pool:
        jobs: list[Future[None]] = []
        try:
            for name, outputs in shards.items():
                if name in finished.shards:
                    done += sum(output.nbytes for output in outputs)
                    continue
                temporary = folder / f"{name}.part"
                with naming(temporary, folder):
                    not_finite = _write_shard(temporary, outputs, plan, source, count)
                jobs.append(pool.submit(finished.add, temporary, folder / name, not_finite))
                for job in jobs:
                    if job.done():
                        job.result()
            # After the outputs, so that an interrupted run has recorded as many of them as can be.
            described = list(pool.map(lambda file: describe(file, manifest), source.files))
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if changed := set(states) ^ set(_file_states(source.files)):
        names = ", ".join(sorted({name for name, *_ in changed}))
        raise OSError(f"{names} in {source.folder} changed while it was read: run it again when nothing writes there")
    if len(shards) > 1:
        weight_map = {output.name: name for name, outputs in shards.items() for output in outputs}
        write_json(folder / INDEX, {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map})
    inputs = {file.name: entry for file, entry in zip(source.files, described, strict=True)}
    return inputs, {name: finished.shards[name] for name in shards}


def _write_shard(
    path: Path, outputs: list[Output], plan: Plan, source: Checkpoint, count: Callable[[int], None]
) -> list[str]:
    """A whole safetensors file; returns the names of tensors with NaN or infinite values."""
    not_finite = []
    with path.open("wb", buffering=0) as file:
        _write_all(file, _header(outputs))
        for output in _aligned(outputs):
            finite = True
            for piece in produce(output, plan, source):
                finite = finite and is_finite(piece)
                count(_write_all(file, piece.flatten().view(torch.uint8).numpy().data))
            if not finite:
                not_finite.append(output.name)
    return not_finite


def _aligned(outputs: list[Output]) -> list[Output]:
    """Wide dtypes first, as safetensors orders them: every tensor then starts at a multiple of its item size."""
    return sorted(outputs, key=lambda output: -output.dtype.itemsize)


def _header(outputs: list[Output]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for output in _aligned(outputs):
        end = start + output.nbytes
        dtype = SAFETENSORS_DTYPES[output.dtype]
        entries[output.name] = {"dtype": dtype, "shape": list(output.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> bytes | None:
    """The head of a safetensors file with its length; None where there is none."""
    with naming(path), path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > min(_LONGEST_HEADER, path.stat().st_size - 8):
            return None
        return start + file.read(length)


def _write_all(file: Any, data: bytes | memoryview) -> int:
    """All bytes: an unbuffered file may take fewer at once (Linux stops at 2 GiB)."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    return len(data)


def is_finite(piece: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity: one of the two ends would be it, and they cost a tenth of a look at
    each value."""
    if piece.numel() == 0:
        return True
    low, high = piece.aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
