"""`mono-internvl benchmark PART...`: speed as ratios of things measured in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import note


_PARTS = "routing, prefill, ttft, decode, serve, preprocess, train, packing, memory, loading, load, scaling"


def benchmark(
    parts: Annotated[
        list[str], typer.Argument(metavar="PART...", help=f"{_PARTS}; all; picture: draw the report given by --json")
    ],
    preset: Annotated[str, typer.Option(metavar="2b|nano", help="dimensions; weights are random")] = "2b",
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="float32 on cpu, bfloat16 on cuda")] = "cpu",
    layers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="layers of text model and vision tower  [default: all; 2b on cpu: 4]"),
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
    if parts == ["picture"]:
        if json_file is None or picture is None:
            raise typer.BadParameter("picture needs --json FILE (a report) and --picture FILE (what to write)")
        _draw(json.loads(json_file.read_text(encoding="utf-8")), picture)
        return
    for path in (json_file, picture):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: no such folder {path.parent}")

    from ..benchmarks.measure import choose_place, print_rows
    from ..benchmarks.suite import run_parts

    to_stdout = json_file is not None and str(json_file) == "-"

    def show(name: str, result: dict[str, Any]) -> None:
        if "error" in result:
            note(f"{name}: {result['error']}")
        for way, reason in result.get("not_run", {}).items():
            note(f"{name}, {way} not run: {reason}")
        if result["rows"] and not to_stdout:
            print_rows(f"{name} ({result['wall_seconds']:.0f} s)", result["rows"])

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


def _draw(report: dict[str, Any], path: Path) -> None:
    try:
        from ..benchmarks.picture import save
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'mono-internvl[eval]'") from error
    save(report, path)
    note(f"wrote {path}")
