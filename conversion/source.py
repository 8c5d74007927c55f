"""Reading a checkpoint: which tensors a folder holds, and their values a piece at a time.

Weights are mapped, not loaded, and the mapping is renewed after every `_REMAP_BYTES`: pages that were read count as
resident until their mapping goes, and a shard may be larger than what we may use.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..common.files import read_json
from ..common.models import HUB_ID, find_folder, title_of


logger = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20
_REMAP_BYTES = 96 << 20
# What the system may map besides what is asked for.
_READ_AROUND_BYTES = 2 << 20

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}
_SHOWN = 5
_MERGE = "merge the adapter first (PeftModel.merge_and_unload), then save_pretrained"
# Part of a tensor's name -> where it comes from and what to do.
_WRAPPERS = {
    "base_layer": f"an unmerged PEFT model was saved; {_MERGE}",
    "lora_A": f"the weights of a LoRA adapter; {_MERGE}",
    "lora_B": f"the weights of a LoRA adapter; {_MERGE}",
    "base_model": f"saved from inside PEFT's wrapper; {_MERGE}",
    "module": "saved from inside DataParallel or DDP; save model.module instead, or take the prefix off",
    "_orig_mod": "saved from inside torch.compile; save model._orig_mod instead, or take the prefix off",
    "_fsdp_wrapped_module": "saved from inside FSDP; save the full state dict without its wrapper",
    "_checkpoint_wrapped_module": "saved from inside a checkpointing wrapper; save the model without it",
}
MONO_INTERNVL = "a Mono-InternVL already"
# What the Hub's client asks with: from its version 2 on, and before. Each has an HTTPError, which is no OSError.
HTTP_LIBRARIES = ("httpx2", "httpx")
# What a snapshot of the Hub needs besides weights.
_HUB_FILES = ["*.json", "tokenizer.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Origin(NamedTuple):
    """Where a checkpoint came from: the folder's name, or a Hub id and its commit."""

    name: str
    hub_id: str | None = None
    commit: str | None = None


def find_source(source: str | os.PathLike[str]) -> tuple[Path, Origin]:
    """A folder as it is, `nano` the bundled model; a Hub id (`owner/name` or `owner/name@revision`) is downloaded into
    the Hub's cache.

    Without a network, or with HF_HUB_OFFLINE, what is in the cache is taken.

    Raises:
        FileNotFoundError: neither a folder nor a Hub id, or not in the cache and the Hub cannot be reached.
        ValueError: a folder without config.json, or a LoRA adapter.
    """
    folder, match = find_folder(source), HUB_ID.fullmatch(str(source))
    if folder is not None:
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} is not a model folder: it has no config.json")
        return folder, Origin(title_of(source))
    assert match is not None
    repo, revision = match.groups()
    folder = _from_hub(repo, revision)
    refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} is not a model: it has no config.json")
    return folder, Origin(repo, repo, folder.name)


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except HfHubHTTPError:
        raise  # the Hub answered: no such repository, no such revision, no access
    except _unreachable() as error:
        asked, reason = f"{repo}@{revision}" if revision else repo, str(error).strip().split("\n")[0]
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError) as missing:
            raise FileNotFoundError(
                f"{asked} is not in the Hub's cache, and the Hub was not reached: {reason}"
            ) from missing
        if not isinstance(error, OfflineModeIsEnabled):
            logger.warning(
                "the Hub was not reached (%s): %s is taken as it lies in the cache, %s", reason, asked, folder
            )
        return folder
    weights = weight_names([name for name in names if "/" not in name])
    if "adapter_config.json" in names:
        weights = []  # it will be refused
    elif weights and weights[0].endswith(".index.json"):
        weights = [path.name for path in _read_placement(Path(hf_hub_download(repo, weights[0], revision=revision)))]
    elif not weights:
        weights = ["*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=[*_HUB_FILES, *weights]))


def _unreachable() -> tuple[type[Exception], ...]:
    """What an unreachable Hub raises, by the client's library; offline mode is an OSError too."""
    return (OSError, *(sys.modules[name].HTTPError for name in HTTP_LIBRARIES if name in sys.modules))


def adapter_settings(folder: Path) -> dict[str, Any] | None:
    """`adapter_config.json` of a LoRA folder; None where there is none."""
    path = folder / "adapter_config.json"
    return read_json(path) if path.is_file() else None


def refuse_adapter(folder: Path) -> None:
    """Raises ValueError with the way out for a folder that holds a LoRA adapter, alone or beside a model: transformers
    would load the base and the adapter, and no weight file holds their sum."""
    settings = adapter_settings(folder)
    if settings is None:
        return
    base = settings.get("base_model_name_or_path") or "BASE"
    raise ValueError(
        f"{folder} holds a LoRA adapter (adapter_config.json) for {base}, not a whole model: merge it first, with "
        f"PeftModel.from_pretrained(MonoInternVLForCausalLM.from_pretrained({str(base)!r}), {str(folder)!r})"
        ".merge_and_unload().save_pretrained(OUT), and take OUT"
    )


class Checkpoint:
    """The weights of a folder, in safetensors or pickles, sharded or not, with an index or without one.

    Attributes:
        config: content of `config.json`.
        files: weight files.
        tensors: name -> file, shape, dtype; nothing is read for it but headers.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        ValueError: a file that is damaged, wants to run code, lacks a tensor that the index says it holds, or was saved
            from inside a wrapper (DDP, torch.compile, PEFT); names it and says what to do.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.index, placed = find_weights(folder)
        self.files = sorted(placed)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            names = placed[file]
            found = dict(_describe(file, _open(file, names)))
            for name in names:
                if name not in found:
                    raise ValueError(f"{file} does not hold {name}, although {self.index} says so")
            for name, info in found.items():
                if name in self.tensors:
                    raise ValueError(f"{name} is in {self.tensors[name].file} and in {file}")
                self.tensors[name] = info
        self.close()
        self._refuse_wrapped()

    def _refuse_wrapped(self) -> None:
        for name in self.tensors:
            for part, what in _WRAPPERS.items():
                if f".{part}." in f".{name}":
                    raise ValueError(f"{self.tensors[name].file} holds {name}: {what}")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file that is mapped."""
        self._file: Path | None = None
        self._handle: Any = None
        self._mapped = 0

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, mapped."""
        file, shape, dtype = self.tensors[name]
        if file != self._file or self._mapped > _REMAP_BYTES:
            self.close()
            self._file, self._handle = file, _open(file)
        part = self._handle[name] if isinstance(self._handle, dict) else self._handle.get_slice(name)
        rows = part[start:stop]
        self._mapped += rows.nbytes + _READ_AROUND_BYTES
        return rows

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor as consecutive rows, about `PIECE_BYTES` each."""
        _, shape, dtype = self.tensors[name]
        row_bytes = max(torch.Size(shape[1:]).numel() * dtype.itemsize, 1)
        step = max(PIECE_BYTES // row_bytes, 1)
        for start in range(0, shape[0], step):
            yield self.rows(name, start, start + step)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, mapped."""
        return self.rows(name, 0, self.tensors[name].shape[0])


def find_weights(folder: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The index, if there is one, and the weight files with the tensors that the index says they hold.

    Raises:
        FileNotFoundError: no weights, or a shard that the index or the others' names promise is missing.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() or path.is_symlink())
    config = folder / "config.json"
    # The key with which transformers lets a configuration name its weights.
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    if named is not None and (not isinstance(named, str) or Path(named).name != named or named not in names):
        raise FileNotFoundError(
            f"{config}: transformers_weights is {named!r}, which is not the name of a file beside it"
        )
    chosen = [named] if named is not None else weight_names(names)
    if not chosen:
        there = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
        hint = f"; it has {', '.join(there[:_SHOWN])}, which transformers does not take either" if there else ""
        raise FileNotFoundError(f"{folder} holds no weights: no model.safetensors and no pytorch_model.bin{hint}")
    for name in chosen:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is a link to a file that does not exist")
    if chosen[0].endswith(".index.json"):
        return folder / chosen[0], _read_index(folder / chosen[0])
    shard = re.search(r"-of-(\d+)\.", chosen[0])
    if shard and len(chosen) != int(shard[1]):
        raise FileNotFoundError(
            f"{folder} holds {len(chosen)} of the {int(shard[1])} shards that {chosen[0]} speaks of"
        )
    return None, {folder / name: [] for name in chosen}


def weight_names(names: list[str]) -> list[str]:
    """Those of a folder's files that transformers takes the weights from, in its order: one file before an index (with
    its shards behind it), safetensors before pickles. Then, which it does not, shards without an index."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{ending}" in names:
            return [f"{stem}.{ending}"]
        if (index := f"{stem}.{ending}.index.json") in names:
            return [index, *_shards(names, stem, ending)]
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        if shards := _shards(names, stem, ending):
            return shards
    return []


def _shards(names: list[str], stem: str, ending: str) -> list[str]:
    return sorted(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", name))


def _read_placement(index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    placed: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} is said to be in {file!r}, which is not the name of a file beside it")
        placed.setdefault(index.parent / file, []).append(name)
    return placed


def _read_index(index: Path) -> dict[Path, list[str]]:
    placed = _read_placement(index)
    for path, names in placed.items():
        if not path.is_file():
            others = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
            raise FileNotFoundError(f"{path} is missing; {index.name} says that it holds {names[0]}{others}")
    return placed


def _open(path: Path, names: list[str] | None = None) -> Any:
    """A safetensors handle, or the dict of a pickle, mapped; `names`: tensors that should be in it, for messages."""
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            lost = _first_cut_tensor(path) or next(iter(names or []), None)
            raise ValueError(_damaged(path, lost, error)) from error
    with path.open("rb") as file:
        is_zip_archive = file.read(4) == b"PK\x03\x04"
    lost = next(iter(names or []), None)
    # A zip archive's directory is at its end.
    if path.stat().st_size == 0 or (is_zip_archive and not zipfile.is_zipfile(path)):
        raise ValueError(_damaged(path, lost, "its end is missing"))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip_archive)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0].strip()
        raise ValueError(
            f"{path} is refused: it is not a plain pickle of tensors, and nothing in it was executed ({reason})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(_damaged(path, lost, error)) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dict of tensors, not {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name!r} is not a tensor but {type(value).__name__}")
    return state


def _damaged(path: Path, tensor: str | None, reason: Exception | str) -> str:
    first_line = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
    return f"{path} is damaged or truncated ({first_line})" + (f"; it should hold {tensor}" if tensor else "")


def _first_cut_tensor(path: Path) -> str | None:
    """The first tensor of a safetensors file that reaches over the file's end, if its header can be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < size:
            return None
        try:
            header = json.loads(file.read(length))
            ends = {name: value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
    cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size - 8 - length]
    return cut[0] if cut else None


def _describe(file: Path, handle: Any) -> Iterator[tuple[str, TensorInfo]]:
    if isinstance(handle, dict):
        for name, tensor in handle.items():
            yield name, TensorInfo(file, tuple(tensor.shape), tensor.dtype)
        return
    for name in handle.keys():  # noqa: SIM118 (not a dict)
        part = handle.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"{file}: {name} has the dtype {part.get_dtype()}, which is not supported")
        yield name, TensorInfo(file, tuple(part.get_shape()), _DTYPES[part.get_dtype()])


# ---------------------------------------------------------------------------------------------------- what a folder is


def vision_kind(values: dict[str, Any]) -> str | None:
    """What a config with a vision side describes, in words; None for others."""
    kind = values.get("model_type")
    tower = (values.get("vision_config") or {}).get("model_type")
    if kind in ("intern_vit_6b", "internvl_vision", "intern_vit_patch"):
        return f"the vision tower ({kind}) of a modular InternVL; Mono-InternVL has no vision encoder"
    if kind == "mono_internvl" or tower == "intern_vit_patch":
        return MONO_INTERNVL
    if kind in ("internvl_chat", "internvl"):
        return f"a modular InternVL with a vision tower ({tower or 'vision encoder'}), not a Mono-InternVL"
    return None


def encoder_tensor(source: Checkpoint) -> str | None:
    """A tensor of a vision encoder's layers, if there is one."""
    encoders = ("encoder.layers.", "encoder.layer.", "vision_tower.")
    return next((name for name in source.tensors if any(part in name for part in encoders)), None)
