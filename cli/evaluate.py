"""`mono-internvl evaluate`: questions about pictures of the plate world, drawn by code that training never used."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DeviceOption,
    DtypeOption,
    ImageTokenOption,
    MaxTilesOption,
    ModelOption,
    check_dtype,
    load_model,
    note,
    progress_bar,
    status,
)


def evaluate(
    model: ModelOption = None,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="questions, six categories in turn")] = 500,
    boxes: Annotated[int, typer.Option(min=0, metavar="N", help="then so many questions for a bounding box")] = 0,
    seed: Annotated[int, typer.Option(metavar="N", help="another seed, other pictures")] = 0,
    out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.json", help="write every question and answer")
    ] = None,
    show_errors: Annotated[int, typer.Option(min=0, metavar="N", help="print the first N wrong answers")] = 0,
    max_tiles: MaxTilesOption = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="questions answered at once")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_token_id: ImageTokenOption = None,
) -> None:
    """Ask a model about plain shapes and numbers; print what it gets right."""
    check_dtype(dtype)
    with status("loading"):
        from mono_internvl.common.files import check_output, write_json
        from mono_internvl.common.models import resolve_model
        from mono_internvl.evaluation.plates import evaluate as answer_all
        from mono_internvl.plates.evaluation_pictures import BOXES, evaluation_set
    if out is not None:
        check_output(out)
    folder = resolve_model(model)

    loaded, processor = load_model(folder, device=device, dtype=dtype, image_token_id=image_token_id)
    examples = chain(evaluation_set(count, seed), evaluation_set(boxes, seed, BOXES))
    asked = count + boxes
    with progress_bar("questions", asked) as update:
        results = answer_all(
            loaded,
            processor,
            examples,
            batch_size=batch_size,
            max_tiles=max_tiles,
            progress=lambda done: update(done, asked),
        )
    _print_table(results.scores)
    if results.median_iou is not None:
        typer.echo(f"median IoU of the boxes: {results.median_iou:.3f}")
    for outcome in results.errors[:show_errors]:
        typer.echo(
            f"{outcome.place:4d} {outcome.category}: {outcome.question} expected {outcome.expected!r}, "
            f"got {outcome.given!r}"
        )
    note(f"{asked} questions in {results.seconds:.1f} s, {asked / results.seconds:.1f} a second")
    if out is not None:
        settings = {"model": model or "bundled nano", "count": count, "boxes": boxes, "seed": seed}
        write_json(out, {**settings, **results.to_dict()}, indent=1)
        note(f"written to {out}")


def _print_table(scores: dict[str, tuple[int, int]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("category")
    for heading in ("correct", "total", "percent"):
        table.add_column(heading, justify="right")
    for i, (category, (right, total)) in enumerate(scores.items()):
        table.add_row(category, str(right), str(total), f"{right / total:.1%}", end_section=i == len(scores) - 1)
    right, total = (sum(column) for column in zip(*scores.values(), strict=True))
    table.add_row("all", str(right), str(total), f"{right / total:.1%}", style="bold")
    Console().print(table)
