"""Draw a report: the prompt's time against its tokens for the peers and the limit, the first token's, growth."""

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..common.files import written_whole


_COLOURS = {"ours": "#0b7285", "dense twin": "#495057", "both experts": "#e8590c", "modular twin": "#862e9c"}
_COLOURS |= {"FLOP limit": "#adb5bd"}


def draw(report: dict[str, Any], ending: str = "png") -> bytes:
    """A picture file of one panel per prefill mode, and one of growth where it was measured.

    Raises:
        ValueError: the report holds no prefill figures.
    """
    prefill = report["parts"].get("prefill", {}).get("rows", [])
    if not prefill:
        raise ValueError("the report holds no prefill figures: run the part prefill first")
    modes = list(dict.fromkeys(entry["mode"] for entry in prefill))
    first_token = [entry for entry in report["parts"].get("ttft", {}).get("rows", []) if "picture" in entry["mode"]]
    scaling = report["parts"].get("scaling", {}).get("rows", [])
    panels = len(modes) + bool(first_token) + bool(scaling)
    matplotlib.rcParams["font.size"] = 9
    figure = Figure(figsize=(max(6.0, 4.4 * panels), 3.9), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, mode in zip(axes, modes, strict=False):
        _draw_prefill(axis, [entry for entry in prefill if entry["mode"] == mode], mode)
    if first_token:
        _draw_first_token(axes[len(modes)], first_token)
    if scaling:
        _draw_growth(axes[-1], scaling, report["parts"]["scaling"].get("settings", {}).get("layers"))
    machine, settings = report["machine"], report["settings"]
    figure.suptitle(
        f"{machine['name']}, {machine['dtype']}, {settings['preset']}, {settings['layers']} layers", fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending, dpi=150)
    return buffer.getvalue()


def _draw_prefill(axis: Any, rows: list[dict[str, Any]], mode: str) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in rows:
        tokens, seconds = entry["tokens"], entry["seconds"]
        if entry["against"] == "dense twin":
            curves.setdefault("ours", []).append((tokens, seconds))
        elif entry["against"] == "ours":
            curves.setdefault("both experts", []).append((tokens, seconds))
        elif entry["against"] == "FLOP limit":
            name = "dense twin" if entry["what"] == "dense twin" else "FLOP limit"
            curves.setdefault(name, []).append((tokens, seconds if name == "dense twin" else seconds / entry["ratio"]))
    for name, points in curves.items():
        style = "--" if name == "FLOP limit" else "-"
        axis.plot(*zip(*points, strict=True), style, marker="o", label=name, color=_COLOURS[name])
    axis.set(xlabel="tokens of the prompt", ylabel="seconds", title=f"prefill, {mode}", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_first_token(axis: Any, rows: list[dict[str, Any]]) -> None:
    tokens = [entry["tokens"] for entry in rows]
    for name, seconds in (
        ("ours", [entry["seconds"] for entry in rows]),
        ("modular twin", [entry["seconds"] / entry["ratio"] for entry in rows]),
    ):
        axis.plot(tokens, seconds, marker="o", label=name, color=_COLOURS[name])
    axis.set(xlabel="tokens of the prompt", ylabel="seconds", title="picture to first token", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_growth(axis: Any, rows: list[dict[str, Any]], layers: int | None) -> None:
    for kind, colour in (("tiles", "#0b7285"), ("batch", "#e8590c")):
        points = [(entry[kind], entry["seconds"]) for entry in rows if entry["kind"] == kind]
        label = "tiles, batch 1" if kind == "tiles" else "batch, 1 tile each"
        axis.plot(*zip(*points, strict=True), marker="o", label=label, color=colour)
    axis.set(xlabel="tiles, or prompts", ylabel="seconds", xscale="log", yscale="log")
    axis.set_title(f"growth, first token, {layers} layers")
    axis.grid(alpha=0.3)
    axis.legend()


def save(report: dict[str, Any], path: Path) -> None:
    """Write the picture to a name that ends in .png, .svg or .pdf.

    Raises:
        ValueError: another ending.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in ("png", "svg", "pdf"):
        raise ValueError(f"{path} cannot be written: the picture's name must end in .png, .svg or .pdf")
    data = draw(report, ending)
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
