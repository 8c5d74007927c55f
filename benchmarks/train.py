"""A training step of S2 (everything trains) on packed sequences of 4,096 tokens: model FLOPs utilisation."""

from typing import Any

import torch

from ..tiling_mono_internvl import PATCH_DIM
from . import flops
from .measure import DATASHEET_FLOPS, Place, interleave, median, peak_flops, quartiles, recorded
from .peers import build, compile_layers, preset_config, uncompile_layers


# (visual, text) tokens of the samples of one pack; together 4,096.
PACK = ((1280, 320), (1280, 320), (768, 128))


def make_pack(config: Any, place: Place, rows: int) -> dict[str, torch.Tensor]:
    """`rows` packs: ids, pixels, positions that restart at each sample, labels on the second half of each text."""
    per_tile = config.vision_config.tokens_per_tile
    ids, positions, labels = [], [], []
    generator = torch.Generator().manual_seed(2)
    for visual, text in PACK:
        words = torch.randint(3, config.image_start_token_id, (text,), generator=generator)
        sample = torch.cat([torch.full((visual,), config.image_token_id), words])
        ids.append(sample)
        positions.append(torch.arange(len(sample)))
        labels.append(torch.where(torch.arange(len(sample)) < visual + text // 2, -100, sample))
    tiles = rows * sum(visual for visual, _ in PACK) // per_tile
    inputs = {
        "input_ids": torch.cat(ids)[None].repeat(rows, 1),
        "position_ids": torch.cat(positions)[None].repeat(rows, 1),
        "labels": torch.cat(labels)[None].repeat(rows, 1),
    }
    inputs = {name: value.to(place.device) for name, value in inputs.items()}
    pixels = torch.randn(tiles, per_tile, PATCH_DIM, generator=generator)
    return {**inputs, "pixel_values": pixels.to(place.device, place.dtype)}


def run_train(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    rows: int = 2,
    accumulation: int = 4,
    seconds: float = 5.0,
    model: Any = None,
) -> dict[str, Any]:
    """Weights, gradients and AdamW's state in the place's dtype, no activation checkpointing.

    On CUDA attention is FlexAttention, which skips what belongs to other samples, with the layers as they are and
    compiled; and SDPA, which needs a whole mask, compiled.
    """
    ours = model if model is not None else build(preset_config(preset, layers), place)
    config = ours.config
    ours.train()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=2e-5, weight_decay=0.01, fused=place.is_cuda)
    batch = make_pack(config, place, rows)
    lengths = [visual + text for visual, text in PACK]
    work = accumulation * rows * flops.training_flops(config, lengths, sum(visual for visual, _ in PACK))
    peak, source = _peak(place, config.text_config, rows * sum(lengths))
    before = config._attn_implementation
    modes = [("compiled", "flex_attention"), ("eager", "flex_attention"), ("compiled", "sdpa")]

    def step() -> None:
        for _ in range(accumulation):
            (ours(**batch, use_cache=False).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    results: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    for mode, attention in modes if place.is_cuda else [("eager", "sdpa")]:
        ours.set_attn_implementation(attention)
        times: list[float] = []
        with recorded(notes, f"{mode}, {attention}"):
            if mode == "compiled":
                compile_layers(ours)
            times = interleave({"step": step}, place, rounds=5, seconds=seconds)["step"]
        uncompile_layers(ours)
        optimizer.zero_grad(set_to_none=True)
        if not times:
            continue
        tokens = accumulation * rows * sum(lengths)
        shares = [work / value / peak for value in times]
        results.append(
            {
                "what": f"S2 step, {tokens:,} tokens in packs of {sum(lengths):,}: MFU",
                "against": f"{peak / 1e12:.3g} TFLOP/s, {source}",
                "ratio": median(shares),
                "iqr": list(quartiles(shares)),
                "seconds": median(times),
                "at_least": 0.45,
                "mode": f"{mode}, {attention}",
                "tokens_per_second": tokens / median(times),
                "flops": work,
                "note": f"{mode}, {attention}; {tokens / median(times):,.0f} tokens/s, "
                f"{work / median(times) / 1e12:.3g} TFLOP/s",
            }
        )
    ours.eval().zero_grad(set_to_none=True)
    ours.set_attn_implementation(before)
    memory = torch.cuda.max_memory_allocated() if place.is_cuda else None
    return {
        "rows": results,
        "not_run": notes,
        "settings": {
            "preset": preset,
            "layers": config.text_config.num_hidden_layers,
            "rows": rows,
            "accumulation": accumulation,
            "peak_memory_bytes": memory,
        },
    }


def _peak(place: Place, text: Any, tokens: int) -> tuple[float, str]:
    """FLOP/s that MFU is a share of: the data sheet's, or where there is none, the measured."""
    name = torch.cuda.get_device_name(place.device) if place.is_cuda else ""
    known = next((peak for key, peak in DATASHEET_FLOPS.items() if key in name), None)
    return (known, "data sheet") if known else (peak_flops(place, tokens, flops.product_shapes(text)), "measured")
