"""One conversation to train on or to ask, as sources give it, and the sizes of its pictures."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from PIL import Image

from ..image_processing_mono_internvl import exif_orientation, load_image


_ON_ITS_SIDE = (5, 6, 7, 8)


class Record(NamedTuple):
    """One conversation. `messages` are chat messages whose pictures are paths or PIL images; `where` names it.

    `finish`, called with the encoded example and the processor, may add targets to it. `category` is the record's own
    word for what it asks, by which answers are counted.
    """

    messages: list[dict[str, Any]]
    where: str
    max_tiles: int | None = None
    finish: Callable[[dict[str, Any], Any], None] | None = None
    category: str | None = None


def picture_sizes(messages: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """Width and height of every picture of a conversation as it is seen; of a file only the header is read."""
    sizes = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] != "image":
                continue
            sizes.append(_size_in_header(part["image"]) or load_image(part["image"]).size)
    return sizes


def _size_in_header(picture: Any) -> tuple[int, int] | None:
    """Width and height of a file as it is seen, or None where only reading the picture tells, or what is wrong."""
    if not isinstance(picture, str) or picture.lower().startswith(("http://", "https://", "data:")):
        return None
    try:
        with Image.open(picture) as opened:
            width, height = opened.size
            # Pillow decodes a PNG to look for EXIF behind the pixels, where nobody writes it.
            has_exif = opened.format != "PNG" or "exif" in opened.info
            turned = has_exif and exif_orientation(opened, picture) in _ON_ITS_SIDE
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return (height, width) if turned else (width, height)
