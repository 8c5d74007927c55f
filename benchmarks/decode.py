"""One token after the other: batch 1 against the bandwidth limit and the dense twin; 16 requests at once."""

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from transformers import StaticCache

from . import flops
from .measure import Place, captured, interleave, median, peak_bandwidth, ratio, recorded, row
from .peers import PAPER_SIZES, build, dense_twin, make_prompt, preset_config


# Paper 2410.08202, Table 6 (A100, LMDeploy, 16 requests, 120 new tokens): (visual, text) -> seconds, tokens/s.
PAPER_TABLE_6 = {
    (768, 256): {"InternVL-1.5-2B": (0.24, 382), "Mono-InternVL-2B": (0.09, 436)},
    (1792, 256): {"InternVL-1.5-2B": (0.45, 183), "Mono-InternVL-2B": (0.15, 232)},
    (3840, 256): {"InternVL-1.5-2B": (1.93, 52), "Mono-InternVL-2B": (0.79, 68)},
}


class Decoder:
    """Greedy decoding with a static cache; every step is one call of `step`, whose tensors never move."""

    def __init__(self, model: Any, cache_length: int, batch: int, place: Place):
        self.model, self.place, self.batch = model, place, batch
        self.cache: Any = StaticCache(config=model.config.get_text_config(), max_cache_len=cache_length)
        self.token = torch.full((batch, 1), 3, device=place.device)
        self.position = torch.zeros((1, 1), dtype=torch.long, device=place.device)
        self.advance: Callable[[], Any] = self.step

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1:].argmax(-1)

    def step(self) -> None:
        self.token.copy_(self.forward(self.token, self.position))
        self.position.add_(1)

    def seek(self, length: int) -> None:
        """Go on from `length` cached tokens."""
        self.position.fill_(length)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def prepare(self, compiled: bool) -> None:
        """Compile the step for its fixed shapes and, on CUDA, keep it as one CUDA graph."""
        self.step()  # eager: allocates the cache
        # gpt-fast's setting: products with one row become reductions at the speed of the memory.
        with torch._inductor.config.patch(coordinate_descent_tuning=self.place.is_cuda and self.batch == 1):
            if compiled:
                self.forward = torch.compile(self.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
                self.seek(0)
                self.step()
            self.advance = captured(self.step, self.place)

    def run(self, start: int, steps: int) -> Callable[[], None]:
        def decode() -> None:
            self.seek(start)
            for _ in range(steps):
                self.advance()

        return decode


def run_decode(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    context: int = 1024,
    steps: int | None = None,
    modes: tuple[str, ...] | None = None,
    seconds: float = 30.0,
    model: Any = None,
) -> dict[str, Any]:
    """Batch 1, static cache, after `context` tokens.

    Args:
        modes: compiled; plain: the kernels as they are. On CUDA the step is one CUDA graph either way. Default:
            compiled, on CUDA both.
    """
    ours = model if model is not None else build(preset_config(preset, layers), place)
    text = ours.config.text_config
    steps = steps or (64 if place.is_cuda else 8)
    bandwidth = peak_bandwidth(place)
    limit = flops.decode_bytes(text, context + steps, place.dtype.itemsize) / bandwidth
    dense = dense_twin(ours, place)
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.no_grad():
        for mode in modes or (("plain", "compiled") if place.is_cuda else ("compiled",)):
            with recorded(notes, mode):
                decoders = {
                    name: Decoder(peer, context + steps, 1, place) for name, peer in (("ours", ours), ("dense", dense))
                }
                for decoder in decoders.values():
                    decoder.prepare(mode == "compiled")
                runs = {name: decoder.run(context, steps) for name, decoder in decoders.items()}
                times = interleave(runs, place, seconds=seconds, rounds=15)
                rows += _decode_rows(
                    {name: [t / steps for t in ts] for name, ts in times.items()}, limit, mode, place.is_cuda
                )
            place.release()
    settings = {"preset": preset, "layers": text.num_hidden_layers, "context": context, "steps": steps}
    return {"rows": rows, "not_run": notes, "settings": {**settings, "bandwidth": bandwidth}}


def _decode_rows(per_step: dict[str, list[float]], limit: float, mode: str, on_cuda: bool) -> list[dict[str, Any]]:
    ours, dense = per_step["ours"], per_step["dense"]
    note = f"{mode}; {1 / median(ours):.1f} tokens/s"
    share = ratio([limit] * len(ours), ours)
    return [
        {
            "what": "decode: share of the bandwidth limit",
            "against": "text path read once",
            **share,
            "seconds": median(ours),
            "at_least": 0.6,
            "mode": mode,
            "note": note,
        },
        row(
            "decode, V-experts present",
            "dense twin",
            ours,
            dense,
            at_most=1.0 if on_cuda and mode == "compiled" else 1.01,
            mode=mode,
            note=mode,
        ),
    ]


def run_serve(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    sizes: tuple[tuple[int, int], ...] = PAPER_SIZES,
    batch: int = 16,
    new_tokens: int = 120,
    compiled: bool = False,
    model: Any = None,
) -> dict[str, Any]:
    """16 requests that arrive together, 120 new tokens each, beside the paper's Table 6 (another GPU and engine)."""
    ours = model if model is not None else build(preset_config(preset, layers), place)
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.no_grad():
        for size in sizes:
            with recorded(notes, f"{size[0]} + {size[1]}"):
                paper = PAPER_TABLE_6.get(size) if preset == "2b" else None
                rows.append(_serve(ours, size, batch, new_tokens, compiled, place) | {"paper": paper})
            place.release()
    settings = {"preset": preset, "layers": ours.config.text_config.num_hidden_layers}
    how = ("compiled" if compiled else "plain") + (", CUDA graph" if place.is_cuda else "")
    return {
        "rows": rows,
        "not_run": notes,
        "settings": {**settings, "batch": batch, "new_tokens": new_tokens, "decode": how},
    }


def _serve(
    ours: Any, size: tuple[int, int], batch: int, new_tokens: int, compiled: bool, place: Place
) -> dict[str, Any]:
    prompt = make_prompt(ours.config, *size, place, batch)
    decoder = Decoder(ours, prompt.tokens + new_tokens, batch, place)
    decoder.prepare(compiled)

    def first_token() -> None:
        # The prompt runs with a growing cache, whose attention needs no mask; the static one gets a copy.
        out = ours(prompt.input_ids, pixel_values=prompt.pixel_values, logits_to_keep=1, use_cache=True)
        for static, grown in zip(decoder.cache.layers, out.past_key_values.layers, strict=True):
            static.keys[:, :, : prompt.tokens].copy_(grown.keys)
            static.values[:, :, : prompt.tokens].copy_(grown.values)
        decoder.token.copy_(out.logits.argmax(-1))

    times = interleave({"first": first_token, "rest": decoder.run(prompt.tokens, new_tokens - 1)}, place, rounds=3)
    first, rest = median(times["first"]), median(times["rest"])
    speed, decoding = batch * new_tokens / (first + rest), batch * (new_tokens - 1) / rest
    return {
        "what": f"{batch} requests, {prompt.visual} + {size[1]} tokens: all first tokens",
        "seconds": first,
        "tokens_per_second": speed,
        "decode_tokens_per_second": decoding,
        "note": f"{speed:,.0f} tokens/s in all, {decoding:,.0f} while decoding",
    }
