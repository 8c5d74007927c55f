"""`mono-internvl export mlx MODEL OUT`: a folder that mlx-vlm runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DTYPES, ImageTokenOption, check_dtype, quiet_libraries
from .convert import ShardOption, byte_bar


def mlx(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of a Mono-InternVL, or nano")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make")],
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help=f"of the weights: {', '.join(DTYPES)} (auto: the model's own)")
    ] = "auto",
    max_shard_size: ShardOption = "4GB",
    image_token_id: ImageTokenOption = None,
) -> None:
    """Write a folder that mlx-vlm runs on Apple silicon: weights, tokenizer and the model's code (docs/mlx.md)."""
    check_dtype(dtype)
    from mono_internvl.common.files import readable_bytes
    from mono_internvl.export import export_mlx

    quiet_libraries()
    with byte_bar("exporting") as progress:
        made = export_mlx(
            source,
            destination,
            dtype=None if dtype == "auto" else dtype,
            max_shard_size=max_shard_size,
            image_token_id=image_token_id,
            progress=progress,
        )
    files = "file" if made.shards == 1 else "files"
    typer.echo(f"{made.folder}: {made.tensors} tensors in {made.shards} {files}, {readable_bytes(made.nbytes)}")
