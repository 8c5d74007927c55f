"""`generate` as a user types it: plain, and with the static cache, for which transformers compiles the step on CUDA."""

import time
from typing import Any

import torch

from .measure import Place, recorded, row
from .peers import build, make_prompt, preset_config


# (visual, text) tokens: prompts of several lengths, of which only the first may compile.
SIZES = ((256, 64), (768, 100), (1792, 130))


def run_generate(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    new_tokens: int = 64,
    rounds: int = 3,
    model: Any = None,
) -> dict[str, Any]:
    """Seconds a token of `generate`, prompt included, with both caches; and what the first call of each kind costs.

    Each size comes with a number of tokens of its own, so that a step compiled for one shape would be compiled again.

    Args:
        rounds: calls of each kind at each size, in turns, after the first one, which compiles.
    """
    ours = model if model is not None else build(preset_config(preset, layers), place)
    text = ours.config.text_config
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.inference_mode():
        for number, (visual, words) in enumerate(sizes):
            with recorded(notes, f"{visual} + {words}"):
                prompt = make_prompt(ours.config, visual, words, place)
                count = new_tokens + number
                first, times = {}, {"dynamic": [], "static": []}  # type: ignore[var-annotated]
                for turn in range(rounds + 1):
                    for cache in ("dynamic", "static"):
                        seconds = _seconds(ours, prompt, cache, count, place)
                        if turn == 0:
                            first[cache] = seconds
                        else:
                            times[cache].append(seconds / count)
                for cache, values in times.items():
                    rows.append(
                        row(
                            f"generate, {prompt.tokens} + {count} tokens, {cache} cache",
                            "dynamic cache",
                            values,
                            times["dynamic"],
                            cache=cache,
                            tokens=prompt.tokens,
                            new_tokens=count,
                            first_call_seconds=first[cache],
                            note=f"a token; first call {first[cache]:.1f} s",
                        )
                    )
    settings = {"preset": preset, "layers": text.num_hidden_layers, "new_tokens": new_tokens}
    return {"rows": rows, "not_run": notes, "settings": settings}


def _seconds(model: Any, prompt: Any, cache: str, new_tokens: int, place: Place) -> float:
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 2,
    }
    if cache == "static":
        options["cache_implementation"] = "static"
    mask = torch.ones_like(prompt.input_ids)
    place.wait()
    begin = time.perf_counter()
    out = model.generate(prompt.input_ids, attention_mask=mask, pixel_values=prompt.pixel_values, **options)
    place.wait()
    if out.shape[1] != prompt.tokens + new_tokens:
        raise RuntimeError(f"{out.shape[1] - prompt.tokens} tokens were generated instead of {new_tokens}")
    return time.perf_counter() - begin
