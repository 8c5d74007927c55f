"""Draws what runs lost while they learnt, and what their checkpoints got right of the validation part:

    python examples/easy_vqa/curves.py runs examples/easy_vqa/curves.png

Reads `runs/RUN/log.json` (of a run under way, its newest checkpoint) and `runs/RUN/val-STEP.json`, which
`mono-internvl evaluate --json` wrote.
"""

from pathlib import Path

import typer
from matplotlib.figure import Figure

from mono_internvl.common.files import read_json, written_whole
from mono_internvl.training.curves import losses


RUNS = {
    "easy_vqa": "full tuning",
    "easy_vqa_lora": "LoRA on the visual experts",
    "easy_vqa_lora_all": "LoRA on all of the decoder",
}


def accuracies(folder: Path) -> list[tuple[int, float]]:
    """(step, percent of right answers), in order of the steps."""
    found = []
    for path in folder.glob("val-*.json"):
        scores = read_json(path)
        found.append((int(path.stem.removeprefix("val-")), 100 * scores["correct"] / scores["total"]))
    return sorted(found)


def main(runs: Path, picture: Path, floor: float = 67.0) -> None:
    """Draw the runs below RUNS into PICTURE; FLOOR is what the question alone gives, in percent."""
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = 0
    for name, label in RUNS.items():
        points = losses(runs / name)
        if points:
            left.plot(*zip(*points, strict=True), label=label)
            drawn += 1
        if points := accuracies(runs / name):
            right.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    if not drawn:
        raise typer.BadParameter(f"{runs} holds no run of {', '.join(RUNS)}")
    left.set(xlabel="step", ylabel="loss of a token", yscale="log", title="training loss")
    right.set(xlabel="step", ylabel="%", title="right answers, validation part")
    right.axhline(floor, color="0.5", linestyle="--", linewidth=1, label="the question alone")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    right.legend(fontsize="small", loc="center right", bbox_to_anchor=(1.0, 0.62))
    with written_whole(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix.removeprefix(".") or "png")


if __name__ == "__main__":
    typer.run(main)
