"""Draws the loss of each stage of a run and, where they were evaluated, what each stage can do.

    mono-internvl evaluate --model runs/nano/s1_1_concept/model --boxes 100 --json runs/nano/s1_1_concept/scores.json
    python -m mono_internvl.training.curves runs/nano docs/nano_curves.png

Reads `STAGE/log.json`, or of a stage that still runs its newest checkpoint, and `STAGE/scores.json`.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.files import read_json, written_whole
from .checkpoints import checkpoints


STAGES = (
    "text",
    "s1_1_concept",
    "s1_2_semantic",
    "s1_3_alignment",
    "s2_instruction",
    "s2_longer",
    "s2_full_plates",
    "s2_four_tiles",
)
# Log entries whose losses are drawn as one point.
WINDOW = 5


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a stage, as far as it has come; empty if it has not begun."""
    if (folder / "log.json").is_file():
        entries = read_json(folder / "log.json", list)
    else:
        kept = checkpoints(folder)
        entries = read_json(kept[-1] / "trainer_state.json")["log_history"] if kept else []
    points = [(entry["step"], float(entry["loss"])) for entry in entries if "loss" in entry]
    groups = [points[first : first + WINDOW] for first in range(0, len(points), WINDOW)]
    return [(group[-1][0], statistics.mean(loss for _, loss in group)) for group in groups]


def scores(folder: Path) -> dict[str, float]:
    """Percent of right answers by category, and `IoU` (median, in percent); empty if the stage was not evaluated."""
    if not (folder / "scores.json").is_file():
        return {}
    found: dict[str, Any] = read_json(folder / "scores.json")
    result = {name: 100 * part["correct"] / part["total"] for name, part in found["categories"].items()}
    if found.get("median_iou") is not None:
        result["IoU"] = 100 * found["median_iou"]
    return result


def draw(runs: Path, picture: Path, stages: tuple[str, ...] = STAGES) -> None:
    """Write the picture.

    Raises:
        FileNotFoundError: no stage below `runs` has logged a loss.
    """
    from matplotlib.figure import Figure

    curves = {stage: losses(runs / stage) for stage in stages}
    curves = {stage: points for stage, points in curves.items() if points}
    if not curves:
        raise FileNotFoundError(f"{runs} holds no run of {', '.join(stages)}")
    judged = {stage: found for stage in curves if (found := scores(runs / stage))}
    figure = Figure(figsize=(9, 7 if judged else 3.6), dpi=100, layout="constrained")
    axes = figure.subplots(2 if judged else 1, 1, squeeze=False)[:, 0]
    start, ends = 0, []
    for stage, points in curves.items():
        axes[0].plot([start + step for step, _ in points], [loss for _, loss in points], label=stage)
        start += points[-1][0]
        ends.append(start)
    for end in ends[:-1]:
        axes[0].axvline(end, color="0.8", linewidth=1)
    axes[0].set(xlabel="steps, stage after stage", ylabel="loss", title="training loss", yscale="log")
    axes[0].legend(ncols=(len(curves) + 1) // 2, fontsize="small", loc="upper center")
    if judged:
        names = list(dict.fromkeys(name for found in judged.values() for name in found))
        for name in names:
            values = [found.get(name, float("nan")) for found in judged.values()]
            axes[1].plot(list(judged), values, marker="o", label=name)
        axes[1].set(ylabel="%", ylim=(0, 102), title="after each stage, pictures by other drawing code")
        axes[1].legend(fontsize="small", loc="upper left")
        axes[1].tick_params(axis="x", labelsize="small")  # names of stages are long
    for axis in axes:
        axis.grid(alpha=0.3)
    with written_whole(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix.removeprefix(".") or "png")


def main(
    runs: Annotated[Path, typer.Argument(help="folder that holds the stages' folders")],
    picture: Annotated[Path, typer.Argument(help="what to write: .png, .svg or .pdf")],
) -> None:
    """Draw losses and scores, stage after stage."""
    draw(runs, picture)


if __name__ == "__main__":
    typer.run(main)
