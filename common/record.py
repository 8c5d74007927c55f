"""One conversation to train on, as sources give it and the loader encodes it."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One conversation. `messages` are chat messages whose pictures are paths or PIL images; `where` names it.

    `finish`, called with the encoded example and the processor, may add targets to it.
    """

    messages: list[dict[str, Any]]
    where: str
    max_tiles: int | None = None
    finish: Callable[[dict[str, Any], Any], None] | None = None
