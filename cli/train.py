"""`mono-internvl train RECIPE`: one stage of EViP, or several in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    context: typer.Context,
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE...", help="names of recipes, or YAML files, in order")
    ] = None,
    runs: Annotated[Path, typer.Option(help="folder of checkpoints, logs and finished stages")] = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="folder of the last model  [default: RUNS/RECIPE/model]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint; skip finished recipes")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="list the recipes and stop")] = False,
) -> None:
    """Train a stage; every key of a recipe can be given as an option, such as --steps 100.

    For several processes start it with accelerate or torchrun: accelerate launch -m mono_internvl train RECIPE
    """
    from ..training.run import run_stage
    from ..training.stages import load_stage, recipe_names

    if show:
        for name in recipe_names():
            typer.echo(name)
        return
    names, overrides = _split(recipes or [], context.args)
    if not names:
        raise typer.BadParameter(f"name a recipe: {', '.join(recipe_names())}")
    for name in names:
        # A mistake in the last recipe is told before the first one runs.
        load_stage(name, overrides)
    for name in names:
        last = output if name == names[-1] else None
        finished = last or runs / (Path(name).stem if Path(name).suffix else name) / "model"
        if resume and finished.is_dir():
            typer.echo(f"{name}: done, {finished}", err=True)
            continue
        run_stage(name, overrides, runs=runs, output=last, resume=resume, write=_say)
    typer.echo(finished)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _split(names: list[str], rest: list[str]) -> tuple[list[str], dict[str, str]]:
    """Recipe names, and `--key value` or `--key=value` pairs, which typer hands on unread."""
    words, overrides = [*names, *rest], {}
    found: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            found.append(word)
        elif "=" in word:
            key, _, value = word[2:].partition("=")
            overrides[key] = value
        elif words:
            overrides[word[2:]] = words.pop(0)
        else:
            raise typer.BadParameter(f"{word} needs a value")
    return found, overrides
