"""Prompt to logits: against the dense twin, both experts and the FLOP limit; picture to first token; growth."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..common.compiling import compile_layers, uncompile_layers
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from . import flops
from .measure import Place, Times, captured, interleave, median, peak_flops, product_of, recorded, row
from .peers import (
    PAPER_SIZES,
    Prompt,
    both_experts,
    build,
    dense_prefill,
    dense_twin,
    graph_prefills,
    make_prompt,
    modular_twin,
    prefill,
    preset_config,
)
from .preprocess import per_tile_recipe, photograph


MODES = ("eager", "graph", "compiled")
# Goals: on CUDA against the dense twin by mode (CPU: 1.03); first token against the modular twin from 2,048 tokens on.
_PREFILL_GOALS = {"eager": 0.95, "graph": 0.98, "compiled": 1.03}
_FIRST_TOKEN_GOAL, _FIRST_TOKEN_FROM = 0.55, 2048


def run_prefill(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    sizes: tuple[tuple[int, int], ...] = PAPER_SIZES,
    modes: tuple[str, ...] | None = None,
    seconds: float = 60.0,
    model: Any = None,
) -> dict[str, Any]:
    """All positions computed on all sides; what `logits_to_keep` saves stands on a line of its own.

    Args:
        modes: eager; graph: one CUDA graph of the eager kernels; compiled: layers compiled, one CUDA graph. Every
            side runs in the same mode. Default: all on CUDA, eager on the CPU.
        seconds: for each size and mode.
    """
    modes = modes or (MODES if place.is_cuda else ("eager",))
    ours = model if model is not None else build(preset_config(preset, layers), place)
    config = ours.config
    dense, both = dense_twin(ours, place), both_experts(ours, place)
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.inference_mode():
        for visual, text in sizes:
            prompt = make_prompt(config, visual, text, place)
            shapes = flops.product_shapes(config.text_config)
            # A GPU's peak holds; a CPU's wanders within minutes, so there each round measures it anew.
            fixed = peak_flops(place, prompt.tokens, shapes) if place.is_cuda else None
            if not place.is_cuda:
                shapes = shapes[:-1]  # the head's product takes as long as several layers
            products = {} if place.is_cuda else {shape: product_of(place, prompt.tokens, *shape) for shape in shapes}
            for mode in modes:
                with recorded(notes, f"{mode} {prompt.tokens}"):
                    functions = _in_mode(mode, ours, dense, both, prompt, place)
                    functions |= {f"product {shape}": product for shape, product in products.items()}
                    times = interleave(functions, place, seconds=seconds, warm_up=_warm_up(place, rows))
                    peaks = [fixed] * len(times["ours"]) if fixed else _peaks(times, prompt.tokens, shapes)
                    rows += _prefill_rows(times, config, prompt, peaks, mode)
                functions = {}
                uncompile_layers(ours, dense, both)
                place.release()
    return {
        "rows": rows,
        "not_run": notes,
        "settings": {"preset": preset, "layers": config.text_config.num_hidden_layers, "modes": list(modes)},
    }


def _warm_up(place: Place, rows: list) -> int:
    """Calls before measuring: on the CPU a call takes seconds, and the first size has warmed it up for the others."""
    return 2 if place.is_cuda else int(not rows)


def _in_mode(mode: str, ours: Any, dense: Any, both: Any, prompt: Prompt, place: Place) -> dict[str, Callable]:
    if mode == "eager":
        functions: dict[str, Callable] = {
            "ours": partial(prefill, ours, prompt),
            "dense": partial(dense_prefill, dense, prompt),
            "both": partial(prefill, both, prompt),
        }
        return functions | {"keep": partial(prefill, ours, prompt, 1)}
    if mode == "compiled":
        # For fixed shapes; layers of one kind share their code.
        compile_layers(ours, dense, both, fullgraph=True, dynamic=False)
    return {
        name: captured(function, place)
        for name, function in graph_prefills(ours, prompt, dense=dense, both=both).items()
    }


def _peaks(times: Times, tokens: int, shapes: list[tuple[int, int]]) -> list[float]:
    """FLOP/s of the fastest product of each round."""
    rounds = zip(*(times[f"product {shape}"] for shape in shapes), strict=True)
    return [max(2 * tokens * i * o / t for (i, o), t in zip(shapes, of_round, strict=True)) for of_round in rounds]


def _prefill_rows(times: Times, config: Any, prompt: Prompt, peaks: list[float], mode: str) -> list[dict[str, Any]]:
    count = partial(flops.prefill_flops, config, prompt.tokens, prompt.visual)
    dense_count = flops.decoder_flops(config.text_config, prompt.tokens)
    what = f"prefill {prompt.tokens}, {prompt.visual} visual"
    common = {"mode": mode, "tokens": prompt.tokens, "visual": prompt.visual}
    ours, on_cuda = times["ours"], prompt.input_ids.is_cuda
    rows = [
        row(
            what,
            "dense twin",
            ours,
            times["dense"],
            at_most=_PREFILL_GOALS[mode] if on_cuda else 1.03,
            flop_ratio=count() / dense_count,
            note=f"{mode}; FLOP ratio {count() / dense_count:.3f}",
            **common,
        ),
        row(
            f"both experts {prompt.tokens}",
            "ours",
            times["both"],
            ours,
            at_least=1.5,
            flop_ratio=count(experts=2) / count(),
            note=f"{mode}; FLOP ratio {count(experts=2) / count():.3f}",
            **common,
        ),
        row(
            what,
            "FLOP limit",
            ours,
            [count() / peak for peak in peaks],
            at_most=1.8 if on_cuda else 1.25,
            peak_flops=median(peaks),
            note=f"{mode}; peak {median(peaks) / 1e12:.3g} TFLOP/s",
            **common,
        ),
        row("dense twin", "FLOP limit", times["dense"], [dense_count / peak for peak in peaks], note=mode, **common),
    ]
    if "keep" in times:
        share = count(keep=1) / count()
        rows.append(
            row(
                f"{what}, last logits only",
                "all logits",
                times["keep"],
                ours,
                note=f"FLOP ratio {share:.3f}",
                flop_ratio=share,
                **common,
            )
        )
    return rows


# ------------------------------------------------------------------------------------------------ time to first token


def run_ttft(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    sizes: tuple[tuple[int, int], ...] = PAPER_SIZES,
    seconds: float = 60.0,
    model: Any = None,
) -> dict[str, Any]:
    """Picture to first token, cache filled, against the modular twin; on CUDA also from the same pixels on, as the
    kernels are launched and as CUDA graphs (without a cache).

    Each side cuts the picture in its own way: ours with our processor (uint8 to the device on CUDA), the modular twin
    with the plain per-tile recipe, which is what its users copy from its model card.
    """
    ours = model if model is not None else build(preset_config(preset, layers), place)
    config = ours.config
    modular = modular_twin(ours, place)
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.inference_mode():
        for visual, text in sizes:
            prompt = make_prompt(config, visual, text, place)
            count = flops.prefill_flops(config, prompt.tokens, prompt.visual, keep=1)
            tiles = prompt.visual // config.vision_config.tokens_per_tile
            share = count / flops.modular_flops(config, modular.config.vision_config, prompt.tokens, tiles, keep=1)
            ways: dict[str, Callable[[], dict[str, Callable]]] = {
                "picture, eager": partial(_from_picture, ours, modular, prompt, tiles, place)
            }
            if place.is_cuda:
                ways["pixels, eager"] = partial(_from_pixels, ours, modular, prompt)
                ways["pixels, graph"] = partial(_from_graph, ours, modular, prompt, place)
            for mode, make in ways.items():
                with recorded(notes, f"{mode} {prompt.tokens}"):
                    times = interleave(make(), place, seconds=seconds, warm_up=_warm_up(place, rows))
                    rows.append(
                        row(
                            f"{mode.partition(',')[0]} to token {prompt.tokens}",
                            "modular twin",
                            times["ours"],
                            times["modular"],
                            **_first_token_goal(place, prompt.tokens),
                            mode=mode,
                            tokens=prompt.tokens,
                            visual=prompt.visual,
                            flop_ratio=share,
                            note=f"{mode}; FLOP ratio {share:.3f}",
                        )
                    )
                place.release()
    return {
        "rows": rows,
        "not_run": notes,
        "settings": {"preset": preset, "layers": config.text_config.num_hidden_layers},
    }


def _first_token_goal(place: Place, tokens: int) -> dict[str, float]:
    if not place.is_cuda:
        return {"at_most": 0.70}
    return {"at_most": _FIRST_TOKEN_GOAL} if tokens >= _FIRST_TOKEN_FROM else {}


def _from_graph(ours: Any, modular: Any, prompt: Prompt, place: Place) -> dict[str, Callable]:
    graphs = graph_prefills(ours, prompt, 1, modular=modular)
    return {name: captured(function, place) for name, function in graphs.items()}


def _from_pixels(ours: Any, modular: Any, prompt: Prompt) -> dict[str, Callable]:
    ids, pixels, tiles = prompt.input_ids, prompt.pixel_values, prompt.tiles
    return {
        "ours": lambda: ours(ids, pixel_values=pixels, logits_to_keep=1, use_cache=True).logits.argmax(-1).tolist(),
        "modular": lambda: (
            modular(ids, pixel_values=tiles, logits_to_keep=1, use_cache=True).logits.argmax(-1).tolist()
        ),
    }


def _from_picture(ours: Any, modular: Any, prompt: Prompt, tiles: int, place: Place) -> dict[str, Callable]:
    side = ours.config.vision_config.image_size
    # `tiles` counts the thumbnail: a strip of tiles - 1 squares has exactly so many.
    grid = max(1, tiles - 1)
    picture = photograph(grid * side * 3 // 4, side * 3 // 4)
    processor = MonoInternVLImageProcessor(
        tile_size=side, min_tiles=grid, max_tiles=grid, do_normalize=not place.is_cuda
    )
    ids = prompt.input_ids

    def run_ours() -> list:
        pixels = processor(picture, return_tensors="pt")["pixel_values"].to(place.device, non_blocking=True)
        return ours(ids, pixel_values=pixels, logits_to_keep=1, use_cache=True).logits.argmax(-1).tolist()

    def run_modular() -> list:
        pixels = torch.from_numpy(per_tile_recipe(picture, grid, 1, side)).to(place.device, place.dtype)
        return modular(ids, pixel_values=pixels, logits_to_keep=1, use_cache=True).logits.argmax(-1).tolist()

    return {"ours": run_ours, "modular": run_modular}


# ------------------------------------------------------------------------------------------------------------- growth


def run_scaling(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    tiles: tuple[int, ...] = (1, 2, 4, 8, 13, 25, 40),
    batches: tuple[int, ...] = (1, 2, 4, 8, 16),
    text: int = 64,
    seconds: float = 3.0,
    model: Any = None,
) -> dict[str, Any]:
    """How the prompt's cost grows from 1 to 40 tiles, and from 1 to 16 prompts of one tile."""
    ours = model if model is not None else build(preset_config(preset, layers), place)
    config = ours.config
    per_tile, longest = config.vision_config.tokens_per_tile, config.text_config.max_position_embeddings
    rows: list[dict[str, Any]] = []
    cases = [("tiles", n, 1) for n in tiles if n * per_tile + text <= longest] + [("batch", 1, b) for b in batches]
    with torch.inference_mode():
        for kind, count, batch in cases:
            prompt = make_prompt(config, count * per_tile, text, place, batch)
            times = interleave({"ours": partial(prefill, ours, prompt, 1)}, place, rounds=5, seconds=seconds)["ours"]
            tokens = batch * prompt.tokens
            work = batch * flops.prefill_flops(config, prompt.tokens, prompt.visual, keep=1)
            rows.append(
                row(
                    f"{count} tiles, batch {batch}",
                    "the first of its kind",
                    times,
                    [next((r["seconds"] for r in rows if r["kind"] == kind), median(times))] * len(times),
                    kind=kind,
                    tiles=count,
                    batch=batch,
                    tokens=tokens,
                    flops=work,
                    note=f"{tokens:,} tokens, {tokens / median(times):,.0f} tokens/s, "
                    f"{work / median(times) / 1e12:.3g} TFLOP/s",
                )
            )
            place.release()
    return {"rows": rows, "settings": {"preset": preset, "layers": config.text_config.num_hidden_layers}}
