"""`mono-internvl benchmark PART...`: speed as ratios of things measured in one run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import note


# `mono_internvl.benchmarks.PARTS`.
PARTS = (
    *("preprocess", "routing", "head", "attention", "prefill", "ttft", "decode", "generate", "serve", "scaling"),
    *("train", "packing", "memory", "loading", "load"),
)
_PICTURES = (".png", ".svg", ".pdf")


def benchmark(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="PART...", help=f"{', '.join(PARTS)}; all that have a goal; picture: draw --json"),
    ],
    preset: Annotated[str, typer.Option(metavar="2b|nano", help="dimensions; weights are random")] = "2b",
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="float32 on cpu, bfloat16 on cuda")] = "cpu",
    layers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="layers of text model and vision tower  [default: all; 2b on cpu: 8]"),
    ] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(min=1, metavar="S", help="leave out parts that would not end in time")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="the report, written after each part; - for stdout")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="time against tokens, as .png, .svg or .pdf")
    ] = None,
) -> None:
    """Measure against a dense twin, the modular twin, both experts on every token, and this machine's limits."""
    drawing_only = _check(parts, json_file, picture)
    if drawing_only and json_file is not None and picture is not None:
        _draw_again(json_file, picture)
        return

    from mono_internvl.benchmarks.measure import choose_place
    from mono_internvl.benchmarks.suite import run_parts

    to_stdout = json_file is not None and str(json_file) == "-"

    def show(name: str, result: dict[str, Any]) -> None:
        if "error" in result:
            note(f"{name}: {result['error']}")
        for way, reason in result.get("not_run", {}).items():
            note(f"{name}, {way} not run: {reason}")
        if result["rows"] and not to_stdout:
            _print_rows(f"{name} ({result['wall_seconds']:.0f} s)", result["rows"])

    report = run_parts(
        choose_place(device),
        () if parts == ["all"] else tuple(parts),
        preset=preset,
        layers=layers,
        budget_seconds=budget_seconds,
        out=None if to_stdout else json_file,
        on_part=show,
    )
    if to_stdout:
        typer.echo(json.dumps(report, indent=1))
    if picture is not None:
        _draw(report, picture)
    failed = [name for name, result in report["parts"].items() if "error" in result]
    if failed:
        raise typer.Exit(1)


def _check(parts: list[str], json_file: Path | None, picture: Path | None) -> bool:
    """Whether there is only a picture to draw; whatever can be refused is refused before anything is measured."""
    allowed = f"allowed are {', '.join(PARTS)}, or one of all and picture alone"
    if unknown := [part for part in parts if part not in (*PARTS, "all", "picture")]:
        raise typer.BadParameter(f"no such benchmark: {', '.join(unknown)}; {allowed}", param_hint="PART")
    if len(parts) > 1 and ("all" in parts or "picture" in parts):
        raise typer.BadParameter(f"{' '.join(parts)}: {allowed}", param_hint="PART")
    drawing_only = parts == ["picture"]
    if drawing_only and (json_file is None or picture is None):
        raise typer.BadParameter("picture needs --json FILE (a report) and --picture FILE (what to write)")
    if picture is not None and not {"all", "prefill", "picture"} & set(parts):
        raise typer.BadParameter("it is drawn from the part prefill, which is not asked for", param_hint="--picture")
    from mono_internvl.common.files import check_output

    if json_file is not None and str(json_file) != "-" and not drawing_only:
        check_output(json_file)
    if picture is not None:
        if picture.suffix.lower() not in _PICTURES:
            raise ValueError(f"{picture} cannot be written: the picture's name must end in {', '.join(_PICTURES)}")
        check_output(picture)
        if find_spec("matplotlib") is None:
            raise ImportError("drawing needs matplotlib: pip install 'mono-internvl[eval]'")
    return drawing_only


def _draw_again(report: Path, picture: Path) -> None:
    from mono_internvl.common.files import read_json

    no_report = f"{report} is no report of mono-internvl benchmark"
    try:
        content = read_json(report)
    except ValueError as error:
        raise ValueError(f"{no_report}: {error}") from error
    try:
        _draw(content, picture)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{no_report}: {error!r}") from error


def _draw(report: dict[str, Any], path: Path) -> None:
    from mono_internvl.benchmarks.picture import save

    save(report, path)
    note(f"wrote {path}")


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """A table for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mono_internvl.benchmarks.measure import goal_text, readable_seconds

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading, justify in (
        ("what", "left"),
        ("against", "left"),
        ("ratio", "right"),
        ("IQR", "right"),
        ("goal", "right"),
        ("time", "right"),
        ("note", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for entry in rows:
        low, high = entry.get("iqr", (None, None))
        table.add_row(
            entry["what"],
            entry.get("against", ""),
            f"{entry['ratio']:.3f}" if "ratio" in entry else "",
            "" if low is None else f"{low:.3f} to {high:.3f}",
            goal_text(entry),
            readable_seconds(entry["seconds"]) if "seconds" in entry else "",
            entry.get("note", ""),
        )
    Console().print(table)
