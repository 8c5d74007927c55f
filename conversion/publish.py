"""Putting a finished folder on the Hub: a listing first, then a large-folder upload, which goes on where it stopped."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from huggingface_hub import HfApi


def files_to_publish(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Path in the repository -> bytes of everything that would go up; hidden files and folders stay.

    Raises:
        ValueError: the folder holds no config.json or no weights.
    """
    folder = Path(folder)
    found = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if "config.json" not in found or not any(name.endswith((".safetensors", ".bin")) for name in found):
        raise ValueError(f"{folder} is not a finished model folder: it needs config.json and weights")
    return found


def publish_checkpoint(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Upload a folder to a model repository, which is made if it does not exist; run again, it goes on.

    Args:
        repo_id: `owner/name`.
        private: of a repository that is made.
        revision: branch, made if it does not exist; default: main.

    Returns:
        The repository's address.

    Raises:
        ValueError: not a finished model folder, or not a repository id.
    """
    folder = Path(folder)
    names = files_to_publish(folder)
    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # The client prints its progress.
    with redirect_stdout(sys.stderr):
        api.upload_large_folder(
            repo_id, folder, repo_type="model", revision=revision, private=private, allow_patterns=list(names)
        )
    return str(url)
