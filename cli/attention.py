"""`mono-internvl attention PICTURE QUESTION -o OUT.png`: where the model looks while it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .chat import load_picture, names_file
from .common import (
    DEFAULT_MAX_PIXELS,
    DeviceOption,
    DtypeOption,
    ImageTokenOption,
    MaxPixelsOption,
    MaxTilesOption,
    ModelOption,
    check_dtype,
    load_model,
    status,
)


_DEFAULT_LAYERS = 4


def attention(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="file or URL")],
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.png", help="the drawing")],
    layers: Annotated[
        str | None, typer.Option(metavar="1,8,24", help="layers to draw, from 1  [default: four, first to last]")
    ] = None,
    token: Annotated[int, typer.Option(min=1, metavar="N", help="the answer token whose heat map is drawn")] = 1,
    model: ModelOption = None,
    max_tiles: MaxTilesOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="longest answer in tokens")] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_pixels: MaxPixelsOption = DEFAULT_MAX_PIXELS,
    image_token_id: ImageTokenOption = None,
) -> None:
    """Draw a question's attention maps, and a heat map over the picture; list the answer's tokens.

    mono-internvl attention plate.png "What color is the star?" -o attention.png
    """
    check_dtype(dtype)
    chosen = parse_layers(layers)
    if not question.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
    if names_file(question):
        raise typer.BadParameter(
            f"{question} names a file; the question comes after one picture", param_hint="QUESTION"
        )
    with status("loading"):
        from mono_internvl.common.files import check_picture_output, written_whole
        from mono_internvl.common.models import resolve_model
        from mono_internvl.evaluation.attention import collect_attention, draw_attention

        check_picture_output(out)
        image = load_picture(picture, max_pixels)
    loaded, processor = load_model(resolve_model(model), device=device, dtype=dtype, image_token_id=image_token_id)
    processor.image_processor.max_pixels = max_pixels
    depth = loaded.config.text_config.num_hidden_layers
    if chosen is not None and chosen[-1] >= depth:
        raise ValueError(f"--layers {chosen[-1] + 1}: this model has layers 1 to {depth}")
    with status("looking"):
        maps = collect_attention(
            loaded,
            processor,
            image,
            question,
            layers=spread_layers(depth) if chosen is None else chosen,
            max_tiles=max_tiles,
            max_new_tokens=max_new_tokens,
        )
        if token > len(maps.answer):
            raise ValueError(
                f"--token {token}: the answer ends with token {len(maps.answer)}: {''.join(maps.answer)!r}"
            )
        drawing = draw_attention(maps, image, token - 1)
        with written_whole(out) as temporary:
            drawing.save(temporary)
    for i, text in enumerate(maps.answer, 1):
        typer.echo(f"{'*' if i == token else ' '} {i:3} {text}")
    typer.echo(f"drawing   {out}")


def parse_layers(text: str | None) -> list[int] | None:
    """'1,8,24' -> [0, 7, 23].

    Raises:
        typer.BadParameter: not whole numbers from 1.
    """
    if text is None:
        return None
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise typer.BadParameter(f"{text!r} is not a list of layers from 1, such as 1,8,24", param_hint="--layers")
    return sorted({int(number) - 1 for number in numbers})


def spread_layers(depth: int) -> list[int]:
    """Evenly from the first to the last of `depth` layers."""
    count = min(depth, _DEFAULT_LAYERS)
    return [round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)]
