"""Putting a finished folder on the Hub: a listing first, then a large-folder upload, which goes on where it stopped."""

from __future__ import annotations

import glob
import os
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .source import find_weights


# What training and interrupted work leave beside a model: nobody needs it to run the model, and `training_args.bin` is
# a pickle that holds paths of the machine.
_LEFTOVERS = (
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*.pth",
    "training_args.bin",
    "checkpoint-*/*",
    "global_step*/*",
    "runs/*",
    "wandb/*",
    "__pycache__/*",
    "*.partial/*",
    "*.part",
    "*.tmp",
    "*.lock",
    "*.log",
    "*tfevents*",
)


def files_to_publish(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Path in the repository -> bytes of everything that would go up; `files_left_out` stay.

    Raises:
        ValueError: the folder holds no config.json or no weights, or a link to nothing; names it.
        FileNotFoundError: a shard is missing.
    """
    folder = Path(folder)
    left_out = set(files_left_out(folder))
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in left_out:
            continue
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist")
        if path.is_file():
            found[name] = path.stat().st_size
    if "config.json" not in found or not any(name.endswith((".safetensors", ".bin")) for name in found):
        raise ValueError(f"{folder} is not a finished model folder: it needs config.json and weights")
    find_weights(folder)
    return found


def files_left_out(folder: str | os.PathLike[str]) -> list[str]:
    """What is not published: hidden files and folders, and what training leaves (optimizer, logs, checkpoints)."""
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]

    def is_leftover(name: str) -> bool:
        # A pattern without a folder is that of a name, wherever it lies.
        return any(fnmatch(name if "/" in rest else name.split("/")[-1], rest) for rest in _LEFTOVERS)

    return [name for name in names if any(part.startswith(".") for part in name.split("/")) or is_leftover(name)]


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it is `owner/name` in the characters that the Hub allows."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a repository (owner/name): {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is not a repository (owner/name): it has no owner")


def publish_checkpoint(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Upload what `files_to_publish` lists, and nothing else, to a model repository; run again, it goes on.

    Args:
        repo_id: `owner/name`; made if it does not exist.
        private: of a repository that is made.
        revision: branch, made if it does not exist; default: main.

    Returns:
        The repository's address.

    Raises:
        ValueError: not a finished model folder, not a repository id, or `private` and the repository is public.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    names = files_to_publish(folder)
    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id} is there already and public: --private cannot hide it; nothing was uploaded")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Names are taken as patterns.
    patterns = [glob.escape(name) for name in names]
    api.upload_large_folder(
        repo_id, folder, repo_type="model", revision=revision, private=private, allow_patterns=patterns
    )
    return str(url)
