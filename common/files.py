"""Files that rooms read and write: whole or not at all, and refused before the work where they could not be written."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from ..tokenization.files import read_json, write_json, written_whole


__all__ = ["check_output", "check_picture_output", "read_json", "readable_bytes", "write_json", "written_whole"]


def check_output(path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Raises:
        FileNotFoundError: its folder is not there. IsADirectoryError, PermissionError: as they say.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: no such folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} allows no new files")


def check_picture_output(path: Path) -> None:
    """Refuse, before the work, a name that Pillow cannot write or a folder that is not there.

    Raises:
        ValueError: the ending. OSError: see `check_output`.
    """
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} cannot be written: its ending must be that of a picture, such as .png or .jpg")
    check_output(path)


def readable_bytes(count: int) -> str:
    """1_234_567 -> '1.23 MB'; powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
