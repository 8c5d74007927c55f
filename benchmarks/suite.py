"""All parts in one process: the model is built once, results are written after each part, a budget is kept."""

import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..common.files import write_json
from . import PARTS
from .decode import run_decode, run_serve
from .generate import run_generate
from .kernels import run_attention, run_head
from .load import run_load
from .measure import Place, describe_machine
from .peers import build, preset_config
from .prefill import run_prefill, run_scaling, run_ttft
from .preprocess import run_preprocess
from .recipe import run_loading, run_memory, run_packing
from .routing import run_routing


logger = logging.getLogger(__name__)

# Seconds that a part takes at the 2B dimensions: on a GPU at full depth, on two CPU cores at CPU_LAYERS.
_EXPECTED = {
    "cuda": {
        "prefill": 110,
        "ttft": 25,
        "head": 30,
        "attention": 10,
        "decode": 90,
        "generate": 60,
        "serve": 25,
        "scaling": 20,
        "train": 130,
        "load": 90,
    },
    "cpu": {"prefill": 1100, "ttft": 300, "decode": 90, "load": 150},
}
CPU_LAYERS = 8
# On the CPU these take long and have no goal there; they run when they are named.
_GPU_ONLY = ("routing", "head", "attention", "generate", "serve", "scaling", "train", "packing", "memory", "loading")
_NEEDS_MODEL = ("prefill", "ttft", "decode", "generate", "serve", "scaling", "train", "packing")


def run_parts(
    place: Place,
    parts: tuple[str, ...] = (),
    *,
    preset: str = "2b",
    layers: int | None = None,
    budget_seconds: float | None = None,
    out: Path | None = None,
    on_part: Callable[[str, dict[str, Any]], None] = lambda name, result: None,
) -> dict[str, Any]:
    """Run `parts` (default: all that have a goal on this device) and return everything that was measured.

    Args:
        layers: of text model and vision tower alike; default: all on CUDA, `CPU_LAYERS` of the 2B model on the CPU.
        budget_seconds: a part that is not expected to end in time is left out and says so.
        out: JSON file, written anew after each part.
        on_part: called with a part's name and result as soon as it is done.

    Raises:
        ValueError: an unknown part, preset or number of layers.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not parts:
        parts = tuple(part for part in PARTS if place.is_cuda or part not in _GPU_ONLY)
    # Loading is of the whole model, unless the caller says otherwise.
    of_load = {"preset": preset, "layers": layers}
    if layers is None and preset == "2b" and not place.is_cuda:
        layers = CPU_LAYERS
    config = preset_config(preset, layers)
    begin = time.perf_counter()
    report: dict[str, Any] = {
        "machine": describe_machine(place),
        "settings": {
            "preset": preset,
            "layers": config.text_config.num_hidden_layers,
            "budget_seconds": budget_seconds,
        },
        "parts": {},
    }
    options: dict[str, Any] = {"preset": preset, "layers": layers}
    model = None
    for part in parts:
        started = time.perf_counter()
        left = float("inf") if budget_seconds is None else budget_seconds - (started - begin)
        expected = _EXPECTED[place.device.type].get(part, 15) if preset == "2b" else 5
        if expected > left:
            result: dict[str, Any] = {"rows": [], "error": f"left out: {left:.0f} s left, about {expected} s needed"}
        else:
            if part in _NEEDS_MODEL and model is None:
                model = build(config, place)
            elif part not in _NEEDS_MODEL:
                model = None if part in ("memory", "load") else model
            result = _attempt(part, place, of_load if part == "load" else options, model)
        result["wall_seconds"] = round(time.perf_counter() - started, 1)
        report["parts"][part] = result
        if out is not None:
            write_json(out, report, indent=1)
        on_part(part, result)
        _clean(place)
    report["wall_seconds"] = round(time.perf_counter() - begin, 1)
    if out is not None:
        write_json(out, report, indent=1)
    return report


def _attempt(part: str, place: Place, options: dict[str, Any], model: Any) -> dict[str, Any]:
    runners: dict[str, Callable[[], dict[str, Any]]] = {
        "preprocess": lambda: run_preprocess(place, preset=options["preset"], seconds=8 if place.is_cuda else 20),
        "routing": lambda: run_routing(place, preset=options["preset"], seconds=4 if place.is_cuda else 20),
        "head": lambda: run_head(place, preset=options["preset"]),
        "attention": lambda: run_attention(place, preset=options["preset"]),
        "prefill": lambda: run_prefill(place, **options, model=model, seconds=3 if place.is_cuda else 30),
        "ttft": lambda: run_ttft(place, **options, model=model, seconds=3 if place.is_cuda else 30),
        "decode": lambda: run_decode(place, **options, model=model, seconds=5 if place.is_cuda else 20),
        "generate": lambda: run_generate(place, **options, model=model),
        "serve": lambda: run_serve(place, **options, model=model),
        "scaling": lambda: run_scaling(place, **options, model=model, seconds=1 if place.is_cuda else 5),
        "train": lambda: _run_train(place, **options, model=model),
        "packing": lambda: run_packing(place, **options, model=model),
        "memory": lambda: run_memory(place, **options),
        "loading": lambda: run_loading(),
        "load": lambda: run_load(place, **options),
    }
    try:
        return runners[part]()
    except Exception as error:  # one part that fails must not cost the others' figures; the error stands in the report
        logger.info("benchmark %s failed", part, exc_info=True)
        return {"rows": [], "error": f"{type(error).__name__}: {error}"}


def _run_train(place: Place, **options: Any) -> dict[str, Any]:
    # The packages that training needs are missed by this part alone.
    from .train import run_train

    return run_train(place, **options)


def _clean(place: Place) -> None:
    torch.compiler.reset()
    gc.collect()
    place.release()
