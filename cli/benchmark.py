"""`mono-internvl benchmark PART...`: speed as ratios of things measured in one run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..benchmarks import PARTS
from .common import check_output, note


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
    if json_file is not None and str(json_file) != "-" and not drawing_only:
        check_output(json_file)
    if picture is not None:
        if picture.suffix.lower() not in _PICTURES:
            raise ValueError(f"{picture} cannot be written: the picture's name must end in {', '.join(_PICTURES)}")
        check_output(picture)
        if not {"all", "prefill", "picture"} & set(parts):
            raise typer.BadParameter(
                "it is drawn from the part prefill, which is not asked for", param_hint="--picture"
            )
        if find_spec("matplotlib") is None:
            raise ImportError("drawing needs matplotlib: pip install 'mono-internvl[eval]'")
    return drawing_only


def _draw_again(report: Path, picture: Path) -> None:
    try:
        _draw(json.loads(report.read_text(encoding="utf-8")), picture)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{report} is no report of mono-internvl benchmark: {error!r}") from error


def _draw(report: dict[str, Any], path: Path) -> None:
    from ..benchmarks.picture import save

    save(report, path)
    note(f"wrote {path}")
