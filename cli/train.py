"""`mono-internvl train RECIPE`: one stage of EViP, or several in a row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


# The fields of `mono_internvl.training.stages.Stage`.
KEYS = (
    *("description", "model", "expand", "dense", "tokenizer", "data", "trains", "visual_attention_experts"),
    *("query_placement", "max_tiles", "max_length", "packing", "padding_free", "loss_weighting", "steps", "epochs"),
    *("batch_size", "accumulation", "learning_rate", "group_learning_rates", "schedule", "min_lr_rate", "warmup"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "drop_path", "bf16"),
    *("gradient_checkpointing", "attn_implementation", "compile", "distillation", "lora"),
    *("on_bad_sample", "max_bad_share", "save_dtype", "workers", "log_steps", "save_steps", "keep_checkpoints", "seed"),
)
_OPTIONS = ("runs", "output", "resume", "list")


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
    if show:
        for name in recipe_names():
            typer.echo(name)
        return
    names, overrides = _split(recipes or [], context.args)
    if not names:
        raise typer.BadParameter(f"name a recipe: {', '.join(recipe_names())}")
    for name in names:
        check_recipe(name)
    from accelerate import PartialState

    from mono_internvl.training.run import run_stage
    from mono_internvl.training.stages import load_stage

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
    # Threads of several processes must end before Python does, or they abort it.
    PartialState().destroy_process_group()
    typer.echo(finished)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _split(names: list[str], rest: list[str]) -> tuple[list[str], dict[str, str]]:
    """Recipe names, and `--key value` or `--key=value` pairs, which typer hands on unread."""
    words, overrides = [*names, *rest], {}
    found: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            found.append(word)
            continue
        option, given, value = word.partition("=")
        key = option[2:].replace("-", "_")
        if not option.startswith("--") or key not in KEYS:
            raise typer.BadParameter(f"no such option: {option}{_did_you_mean(key, (*KEYS, *_OPTIONS), '--')}")
        if not given and not words:
            raise typer.BadParameter(f"{option} needs a value")
        overrides[key] = value if given else words.pop(0)
    return found, overrides


# ------------------------------------------------------------------- recipes, found without importing what trains them


def _folder() -> Path:
    library = find_spec("mono_internvl")
    assert library is not None and library.origin is not None
    return Path(library.origin).with_name("training") / "recipes"


def recipe_names() -> list[str]:
    """As `mono_internvl.training.stages.recipe_names`."""
    folder = _folder()
    paths = [path for path in folder.rglob("*.yaml") if not path.name.startswith("_")]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in paths)


def check_recipe(name: str) -> None:
    """Refuse, before anything is imported, a recipe that is not there.

    Raises:
        FileNotFoundError: names the closest and all others.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else _folder() / f"{name}.yaml"
    if not path.is_file():
        names = recipe_names()
        raise FileNotFoundError(f"no recipe {name}{_did_you_mean(name, names)} Recipes: {', '.join(names)}")


def _did_you_mean(name: str, allowed: Iterable[str], before: str = "") -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.4)
    return f"; did you mean {before}{close[0]}?" if close else "."
