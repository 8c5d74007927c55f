"""What an export made, and the types that it can write; known without the library that writes them."""

from dataclasses import dataclass
from pathlib import Path


# Of the decoder's matrices. `auto` is the checkpoint's own.
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@dataclass(frozen=True)
class GgufReport:
    """What was made.

    Attributes:
        folder: the destination.
        sizes: bytes of each file in it.
        tensors: of both files.
        type: one of `GGUF_TYPES`, not auto.
        architecture: llama.cpp's name of the graph.
        seconds: wall time of writing.
    """

    folder: Path
    sizes: dict[str, int]
    tensors: int
    type: str
    architecture: str
    seconds: float
