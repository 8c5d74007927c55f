"""Stages as data: a recipe is one YAML file that fills one `Stage`.

    load_stage("mono-internvl-2b/s1_1_concept")          a recipe of this package, by name
    load_stage("my.yaml", {"learning_rate": "5e-5"})     a file, with what the command line overrides

Every key is a field of `Stage`, and nothing else is accepted. A recipe may start from another with `base: NAME`, or
`base: FILE.yaml` for a file beside it.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..common.parameters import GROUPS
from ..configuration_checks_mono_internvl import QUERY_PLACEMENTS
from ..configuration_mono_internvl import VISUAL_ATTENTION_EXPERTS
from ..tiling_mono_internvl import AUTO, check_max_tiles
from .distillation import read_distillation


RECIPES = Path(__file__).with_name("recipes")
SCHEDULES = ("constant_with_warmup", "cosine", "cosine_with_min_lr", "linear")
WEIGHTINGS = ("token", "sample", "square")
# Of `expand_checkpoint`, and what is done to its result.
EXPAND_OPTIONS = (
    *("vision_hidden_size", "tile_size", "num_learnable_queries", "query_grids", "query_placement", "expert_gates"),
    *("dtype", "max_shard_size", "seed", "base_model", "verify", "manifest", "start", "max_tiles"),
)
_QUERY_OPTIONS: dict[str, Any] = {
    "num_learnable_queries": 0,
    "query_grids": None,
    "query_placement": "image",
    "expert_gates": False,
}
# Of recipes that are files of your own.
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Stage:
    """One stage of training. Steps are optimiser steps; lengths are tokens.

    Args:
        description: what the stage is for, and its source.
        model: folder, Hub id or name of an earlier recipe (its output in the runs folder) to start from.
        expand: options of `expand_checkpoint` that make a Mono-InternVL of a dense `model` first; also `start`
            (`start_vision`'s) and `max_tiles`, which the model's processor keeps.
        dense: dimensions of a dense language model to start from at random instead of `model`; with `tokenizer`.
        tokenizer: folder of the tokenizer and processor; default: the model's.
        data: sources, each a path or a mapping with `path`, and `weight` or `repeat`, `root`, `name`, `max_tiles`;
            or `{"plate_world": TASK}`.
        trains: names of parameter groups (`common.parameters`).
        visual_attention_experts: give the model these experts while it is expanded (1.5).
        query_placement: where the model's learnable queries stand from this stage on, `image` or `question`
            (`MonoInternVLConfig`); default: where they stood.
        max_tiles: most tiles of a picture, thumbnail not counted, not "auto"; several pictures of a sample share them.
        max_length: most tokens of a sample, and the size of a pack.
        packing: fill packs of `max_length` with several samples; else pad.
        padding_free: instead of padding, join the samples of a micro-batch in one row, as packs are joined.
        loss_weighting: token (every target token counts the same), sample (every sample), square (between them:
            1 / sqrt(targets of the sample)).
        steps, epochs: length of the stage; one of the two.
        group_learning_rates: `{GROUP: RATE}`: peak rates of groups that train, instead of `learning_rate`; the schedule
            is the same.
        batch_size: samples (packs, if packing) of one optimiser step, over all processes and accumulation.
        accumulation: micro-steps of one optimiser step.
        warmup: warm-up in steps, or as a share of all steps if below 1.
        drop_path: stochastic depth while training, growing linearly with depth up to this share.
        attn_implementation: name of an attention backend; auto: flex_attention for packs on CUDA, else the model's own.
        compile: compile each decoder layer; auto: for packs with flex_attention on CUDA (`backend.choose_backend`).
        distillation: `{"teacher": FOLDER, "weight": 1.0, "projection": "random"}`: what learnable queries learn from
            (`distillation.Distillation`).
        lora: `{"groups": [...], "r": 16, "alpha": 32, "dropout": 0.0}`: adapters instead of full training of `trains`.
        save_dtype: of the finished model, float32 or bfloat16.
        on_bad_sample: error, or skip: leave it out, count it and log its name; the run fails above `max_bad_share`.
    """

    description: str = ""
    model: str | None = None
    expand: dict | None = None
    dense: dict | None = None
    tokenizer: str | None = None
    data: list | None = None
    trains: tuple[str, ...] = ()
    visual_attention_experts: str | None = None
    query_placement: str | None = None
    max_tiles: int = 12
    max_length: int = 4096
    packing: bool = True
    padding_free: bool = False
    loss_weighting: str = "token"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128
    accumulation: int = 1
    learning_rate: float = 1e-4
    group_learning_rates: dict | None = None
    schedule: str = "cosine"
    min_lr_rate: float = 0.0
    warmup: float = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    drop_path: float = 0.0
    bf16: bool = True
    gradient_checkpointing: bool = True
    attn_implementation: str = "auto"
    compile: str | bool = "auto"
    distillation: dict | None = None
    lora: dict | None = None
    on_bad_sample: str = "error"
    max_bad_share: float = 0.01
    save_dtype: str = "float32"
    workers: int = 2
    log_steps: int = 10
    save_steps: int = 500
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tiles == AUTO:  # type: ignore[comparison-overlap]
            raise ValueError(
                'max_tiles: "auto" is for answers; training takes a whole number, by which samples are planned'
            )
        if (self.expand or {}).get("max_tiles") is not None:
            # The model's processor keeps it, "auto" too.
            check_max_tiles((self.expand or {})["max_tiles"], "expand: max_tiles")
        if self.expand is not None:
            self._check_expand(self.expand)
        unknown = [group for group in (*self.trains, *(self.lora or {}).get("groups", ())) if group not in GROUPS]
        if unknown:
            raise ValueError(f"trains: {_unknown(unknown[0], GROUPS)}")
        choices = {
            "schedule": SCHEDULES,
            "loss_weighting": WEIGHTINGS,
            "on_bad_sample": ("error", "skip"),
            "save_dtype": ("float32", "bfloat16"),
            "compile": ("auto", True, False),
            "visual_attention_experts": (*VISUAL_ATTENTION_EXPERTS, None),
            "query_placement": (*QUERY_PLACEMENTS, None),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key}: {_unknown(str(getattr(self, key)), [_word(a) for a in allowed if a is not None])}"
                )
        if not self.trains and not self.lora:
            raise ValueError(f"trains: name at least one group of {', '.join(GROUPS)}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs")
        for key in ("steps", "epochs", "batch_size", "accumulation", "max_tiles", "max_length", "learning_rate"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key}: {value} must be positive")
        for key in ("log_steps", "save_steps", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")
        for key in ("workers", "warmup", "weight_decay", "max_grad_norm"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}: {getattr(self, key)} must not be negative")
        for key in ("max_bad_share", "min_lr_rate"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be between 0 and 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: {self.drop_path} must be at least 0 and less than 1")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size: {self.batch_size} must be a multiple of accumulation {self.accumulation}")
        if self.lora and self.trains:
            raise ValueError("lora: only adapters would train; leave trains empty (trains: []), groups stand in lora")
        if self.visual_attention_experts and self.expand is None:
            raise ValueError("visual_attention_experts: made while a model is expanded, and there is no expand")
        if self.dense is not None:
            given: dict[str, Any] = {"expand": self.expand is not None, "lora": self.lora, "drop_path": self.drop_path}
            given["query_placement"] = self.query_placement
            if refused := next((key for key, value in given.items() if value), None):
                raise ValueError(f"{refused}: not for a dense model that starts at random")
        for key in ("query_placement", "distillation"):
            made = self.expand is None or self.expand.get("num_learnable_queries")
            if getattr(self, key) is not None and not made:
                raise ValueError(
                    f"{key}: the model gets no learnable queries; expand: num_learnable_queries gives it some"
                )
        read_group_rates(self)
        if self.min_lr_rate and self.schedule != "cosine_with_min_lr":
            raise ValueError(f"min_lr_rate: the schedule {self.schedule} ends at 0; it belongs to cosine_with_min_lr")
        if self.packing and self.padding_free:
            raise ValueError("padding_free: packs hold no padding already; set packing: false, or leave this out")
        if self.distillation is not None:
            read_distillation(self.distillation)
        if not self.data:
            raise ValueError("data: name at least one source")
        if sum(value is not None for value in (self.model, self.dense)) != 1:
            raise ValueError("give one of model (to start from) and dense (dimensions to start at random)")

    def _check_expand(self, options: dict[str, Any]) -> None:
        # Not before it is needed: what expands brings more with it than recipes do.
        from ..conversion.expand import read_additions

        if unknown := [key for key in options if key not in EXPAND_OPTIONS]:
            beside = "visual_attention_experts" in unknown
            hint = "; it stands beside expand, not in it." if beside else ""
            raise ValueError(f"expand: {_unknown(unknown[0], EXPAND_OPTIONS, 'option')}{hint}")
        try:
            read_additions(**{name: options.get(name, default) for name, default in _QUERY_OPTIONS.items()})
        except ValueError as error:
            raise ValueError(f"expand: {error}") from error


def read_group_rates(stage: Stage) -> dict[str, float]:
    """`group_learning_rates` as numbers.

    Raises:
        ValueError: a group that does not train, or a rate that is no positive number.
    """
    trained = stage.trains or (stage.lora or {}).get("groups", ())
    rates = {}
    for group, value in (stage.group_learning_rates or {}).items():
        if group not in trained:
            raise ValueError(f"group_learning_rates: {group} does not train; those that do: {', '.join(trained)}")
        rates[group] = _fit(f"group_learning_rates: {group}", value, float)
        if not 0 < rates[group] < math.inf:
            raise ValueError(f"group_learning_rates: {group}: {rates[group]} must be positive")
    return rates


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    paths = [path for path in RECIPES.rglob("*.yaml") if not path.name.startswith("_")]
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in paths)


def load_stage(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Stage:
    """Read a recipe, by name or path, and lay overrides over it (strings are read as YAML).

    Raises:
        FileNotFoundError: no such recipe; names the closest.
        ValueError: an unknown key or group (names the closest), or a value of the wrong kind; names the recipe.
    """
    changes = {key.replace("-", "_"): read_override(value) for key, value in (overrides or {}).items()}
    values = {**_read(recipe), **changes}
    fields = {field.name: field for field in dataclasses.fields(Stage)}
    hints = typing.get_type_hints(Stage)
    try:
        for key in values:
            if key not in fields:
                raise ValueError(_unknown(key, list(fields), "key"))
        # An override of one length replaces the recipe's other.
        for one, other in (("steps", "epochs"), ("epochs", "steps"), ("model", "dense")):
            if one in changes and other not in changes:
                values[other] = None
        return Stage(**{key: _fit(key, value, hints[key]) for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"recipe {recipe}: {error}") from error


def _read(recipe: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a recipe says, over what its base says; `above`: the files that led here."""
    path = Path(recipe)
    if path.suffix not in SUFFIXES:
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {recipe}: {_unknown(str(recipe), recipe_names(), 'recipe')}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys, not {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if path in above:
        raise ValueError(f"{path}: its base leads back to it")
    # A file beside the one that names it, or a recipe of this package.
    beside = path.parent / str(base)
    return {**_read(beside if beside.suffix in SUFFIXES else str(base), (*above, path)), **values}


def read_override(value: Any) -> Any:
    """A value of the command line: strings are YAML."""
    return yaml.safe_load(value) if isinstance(value, str) else value


def _word(value: Any) -> str:
    """As YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(name: str, allowed: Any, what: str = "value") -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown {what} {name!r}{hint} Allowed: {', '.join(allowed)}"


def _fit(key: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type; YAML reads 1e-4 as a string and 1 as an int."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in kinds:
            return None
        raise ValueError(f"{key} must not be empty")
    if isinstance(value, bool) and bool in kinds:
        return value
    kind = next(typing.get_origin(k) or k for k in kinds if k is not type(None))
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if kind is tuple and isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if kind is list and isinstance(value, (str, dict)):
        return [value]
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    elif (key, value) == ("max_tiles", AUTO):
        return value  # refused with its reason
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{key}: {value!r} is not {kind.__name__}")
