"""`mono-internvl export FORMAT MODEL OUT`: the model as files of other runtimes, one command a format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import ImageTokenOption, MaxTilesNumberOption, quiet_libraries
from .convert import byte_bar, one_of
from .export_mlx import mlx


# `mono_internvl.export.GGUF_TYPES`.
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

export = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@export.callback()
def formats() -> None:
    """Write the model as files of other runtimes."""


@export.command()
def gguf(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of a Mono-InternVL, or nano")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make")],
    kind: Annotated[
        str, typer.Option("--type", metavar="TYPE", help=f"of the matrices: {', '.join(GGUF_TYPES)} (the model's own)")
    ] = "auto",
    name: Annotated[str | None, typer.Option(metavar="NAME", help="what runtimes show  [default: MODEL's]")] = None,
    max_tiles: MaxTilesNumberOption = None,
    image_token_id: ImageTokenOption = None,
    repaired_cogvlm: Annotated[
        bool, typer.Option("--repaired-cogvlm", help="for a llama.cpp that heeds theta with visual attention experts")
    ] = False,
) -> None:
    """Write OUT/model.gguf and OUT/mmproj.gguf for llama.cpp, Ollama, LM Studio and the like (docs/local.md)."""
    one_of(kind, GGUF_TYPES, "--type")
    from mono_internvl.common.files import readable_bytes
    from mono_internvl.export import export_gguf

    quiet_libraries()
    with byte_bar("exporting") as progress:
        report = export_gguf(
            source,
            destination,
            kind,
            name=name,
            max_tiles=max_tiles,
            image_token_id=image_token_id,
            repaired_cogvlm=repaired_cogvlm,
            progress=progress,
        )
    files = ", ".join(f"{file} {readable_bytes(size)}" for file, size in report.sizes.items())
    typer.echo(f"{report.folder}: {files} ({report.type}, {report.tensors} tensors)")
    typer.echo(f"written in {report.seconds:.1f} s", err=True)


export.command()(mlx)
