"""The model as files of other runtimes.

gguf_tensors.py     which tensors a GGUF file holds, and how they come out of ours
gguf_vocabulary.py  the tokenizer as tokens, scores and types
gguf_template.py    the chat template with llama.cpp's marks for pictures
gguf_metadata.py    everything else that the files say
gguf_files.py       writing a file a piece at a time
gguf_job.py         what can be held, and both files or neither
mlx.py              a folder for mlx-vlm (Apple silicon): weights under MLX's names, and the model's code in MLX
mlx_model.py        that code; it is copied, and nothing here imports it
"""

from __future__ import annotations

import os

from ..conversion.writer import Progress
from .mlx import Exported, export_mlx
from .report import GGUF_TYPES, GgufReport


def export_gguf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    type: str = "auto",
    *,
    name: str | None = None,
    max_tiles: int | None = None,
    image_token_id: int | None = None,
    repaired_cogvlm: bool = False,
    progress: Progress | None = None,
) -> GgufReport:
    """Write `model.gguf` and `mmproj.gguf` for llama.cpp and what embeds it (docs/local.md).

    Args:
        source: folder or Hub id of a Mono-InternVL in either layout.
        destination: folder to make; must not exist, or be empty. After a failure nothing of it is left.
        type: of the decoder's matrices, one of `GGUF_TYPES`; vectors and the visual embedding are float32.
        name: what runtimes show; default: the folder's or the repository's.
        max_tiles: most tiles of a picture, which runtimes have no setting for; default: the processor's.
        image_token_id: of an official source whose nine tokens are not its last ids.
        repaired_cogvlm: write visual attention experts whose theta llama.cpp does not heed unless it is repaired.
        progress: called with (bytes written, bytes in all).

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: what llama.cpp cannot hold, by name; a type that is not known; a damaged source.
        FileExistsError, FileNotFoundError, OSError: the destination or the source; not enough disk.
    """
    if type not in GGUF_TYPES:
        raise ValueError(f"type {type!r} is not one of {', '.join(GGUF_TYPES)}")
    try:
        from .gguf_job import export
    except ImportError as error:
        if error.name != "gguf":
            raise
        raise ImportError("GGUF files are written with the package gguf: pip install 'mono-internvl[gguf]'") from error
    return export(
        source,
        destination,
        type,
        name=name,
        max_tiles=max_tiles,
        image_token_id=image_token_id,
        repaired_cogvlm=repaired_cogvlm,
        progress=progress,
    )


__all__ = ["GGUF_TYPES", "Exported", "GgufReport", "export_gguf", "export_mlx"]
