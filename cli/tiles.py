"""`mono-internvl tiles PICTURE -o OUT.png`: what the model sees of a picture, tile by tile and patch by patch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .chat import load_picture
from .common import DEFAULT_MAX_PIXELS, MaxPixelsOption, MaxTilesOption, quiet_libraries, status


if TYPE_CHECKING:
    from mono_internvl.image_processing_mono_internvl import MonoInternVLImageProcessor


def tiles(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="file or URL")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.png", help="the drawing")],
    tile_size: Annotated[
        int | None, typer.Option(min=28, metavar="PX", help="side of a tile, a multiple of 28  [default: 448]")
    ] = None,
    max_tiles: MaxTilesOption = None,
    min_tiles: Annotated[int | None, typer.Option(min=1, metavar="N", help="fewest tiles  [default: 1]")] = None,
    thumbnail: Annotated[
        bool | None, typer.Option("--thumbnail/--no-thumbnail", help="the whole picture as the last tile")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="take the defaults of this folder's or Hub id's processor, or nano's"),
    ] = None,
    max_pixels: MaxPixelsOption = DEFAULT_MAX_PIXELS,
) -> None:
    """Draw how a picture is cut into tiles and 28-px patches, and count its visual tokens."""
    with status("reading"):
        from mono_internvl.common.files import check_picture_output, written_whole
        from mono_internvl.common.tiling import cut, describe_tiling, draw_tiling

        check_picture_output(out)
        image = load_picture(picture, max_pixels)
        # "auto" keeps within the number that holds without it, so that it is said in the call.
        auto, most = (max_tiles, None) if isinstance(max_tiles, str) else (None, max_tiles)
        given = {"tile_size": tile_size, "max_tiles": most, "min_tiles": min_tiles, "use_thumbnail": thumbnail}
        processor = _make_processor(model, {name: value for name, value in given.items() if value is not None})
        tiling, seen = cut(image, processor, max_tiles=auto)
        drawing = draw_tiling(Path(picture).name if len(picture) < 200 else "picture", tiling, seen)
    with written_whole(out) as temporary:
        drawing.save(temporary)
    for label, value in describe_tiling(tiling):
        typer.echo(f"{label:8} {value}")
    typer.echo(f"{'drawing':8} {out}")


def _make_processor(model: str | None, given: dict[str, Any]) -> MonoInternVLImageProcessor:
    from mono_internvl.common.models import load_processor, resolve_model
    from mono_internvl.image_processing_mono_internvl import MonoInternVLImageProcessor
    from mono_internvl.tiling_mono_internvl import TILE_OPTIONS

    settings: dict[str, Any] = {}
    if model is not None:
        quiet_libraries()
        base = load_processor(resolve_model(model)).image_processor
        settings = {name: getattr(base, name) for name in ("tile_size", *TILE_OPTIONS)}
    return MonoInternVLImageProcessor(max_pixels=None, **{**settings, **given})
