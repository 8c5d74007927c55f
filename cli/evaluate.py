"""`mono-internvl evaluate`: questions about pictures of the plate world, or those of your own records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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


if TYPE_CHECKING:
    from mono_internvl.evaluation.answers import Results
    from mono_internvl.evaluation.records import Question

_DEFAULT_COUNT = 500


def evaluate(
    model: ModelOption = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="ask what these records ask, in the forms that `train` reads")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=f"questions  [default: {_DEFAULT_COUNT} of six categories; of DATA all]"),
    ] = None,
    boxes: Annotated[int, typer.Option(min=0, metavar="N", help="then so many questions for a bounding box")] = 0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="another seed, other pictures  [default: 0]")] = None,
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
    """Ask a model about plain shapes and numbers, or about your own records; print what it gets right."""
    check_dtype(dtype)
    if data is not None and (boxes or seed is not None):
        raise typer.BadParameter("--boxes and --seed are about the plate world's pictures; leave them out with --data")
    with status("loading"):
        from mono_internvl.common.files import check_output, write_json
        from mono_internvl.common.models import resolve_model
    if out is not None:
        check_output(out)
    folder = resolve_model(model)
    # Read before the model is: what is wrong with the data is told at once.
    questions = None if data is None else _questions(data)[:count]

    loaded, processor = load_model(folder, device=device, dtype=dtype, image_token_id=image_token_id)
    options: dict[str, Any] = {"batch_size": batch_size, "max_tiles": max_tiles}
    results: Results
    with progress_bar("questions") as update:
        if questions is not None:
            from mono_internvl.evaluation.records import answer_records

            options["progress"] = _counting(update, len(questions))
            results = answer_records(loaded, processor, questions, **options)
            settings: dict[str, Any] = {"data": data, "count": len(questions)}
        else:
            from mono_internvl.evaluation.plates import evaluate as answer_plates
            from mono_internvl.plates.evaluation_pictures import BOXES, evaluation_set

            settings = {"count": count or _DEFAULT_COUNT, "boxes": boxes, "seed": seed or 0}
            options["progress"] = _counting(update, settings["count"] + boxes)
            plates = evaluation_set(settings["count"], settings["seed"])
            examples = chain(plates, evaluation_set(boxes, settings["seed"], BOXES))
            results = answer_plates(loaded, processor, examples, **options)
    values = results.to_dict()
    _print_table(results.scores)
    if values.get("median_iou") is not None:
        typer.echo(f"median IoU of the boxes: {values['median_iou']:.3f}")
    for outcome in results.errors[:show_errors]:
        typer.echo(
            f"{outcome.place:4d} {outcome.category}: {outcome.question} expected {outcome.expected!r}, "
            f"got {outcome.given!r}"
        )
    asked = values["total"]
    note(f"{asked} questions in {results.seconds:.1f} s, {asked / results.seconds:.1f} a second")
    if out is not None:
        write_json(out, {"model": model or "bundled nano", **settings, **values}, indent=1)
        note(f"written to {out}")


def _counting(update: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    return lambda done: update(done, total)


def _questions(data: str) -> list[Question]:
    """What the records of a source ask, each record once, whatever its weight or `repeat` in training.

    Raises:
        ValueError, OSError: a source or record that cannot be used, by name.
    """
    from mono_internvl.evaluation.records import UNNAMED, questions_of
    from mono_internvl.training.sources import open_sources, reading
    from mono_internvl.training.stages import read_override

    def all_questions() -> Iterator[Question]:
        specs = read_override(data)
        for source in open_sources(specs if isinstance(specs, list) else [specs]):
            for index in range(len(source.records)):
                record = source.records[index]
                with reading(record.where):
                    yield from questions_of(record.messages, record.category or UNNAMED, record.max_tiles)

    return list(all_questions())


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
