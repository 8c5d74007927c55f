"""What the recipe saves: packed against padded batches, S1.1's memory against full tuning's, waiting for data.

python -m mono_internvl.benchmarks.recipe MODE PRESET LAYERS DEVICE      one measurement of memory: s1_1, full
"""

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..configuration_mono_internvl import MonoInternVLConfig
from ..tiling_mono_internvl import PATCH_DIM
from .measure import Place, interleave, median, quartiles, row, run_child
from .peers import build, preset_config


_MODULE = "mono_internvl.benchmarks.recipe"
# A mixture like LLaVA's and InternVL's: (share, tiles without thumbnail, median of the text's tokens).
MIXTURE = ((0.25, (0,), 220), (0.35, (1,), 120), (0.25, (2, 3, 4, 6), 140), (0.15, (6, 9, 12), 300))
MEMORY_GROUPS = {
    "s1_1": ("visual_embedding", "visual_experts"),
    "full": ("visual_embedding", "visual_experts", "attention", "text"),
}
MEMORY_TOKENS = (768, 256)


def mixture_samples(count: int, config: MonoInternVLConfig, max_length: int) -> list[dict[str, torch.Tensor]]:
    """`count` samples as `encode_conversation` makes them: random words, lengths of MIXTURE, half the text learnt."""
    rng, words = random.Random(5), torch.Generator().manual_seed(5)
    samples: list[dict[str, torch.Tensor]] = []
    per_tile = config.vision_config.tokens_per_tile
    while len(samples) < count:
        _, grids, middle = rng.choices(MIXTURE, [share for share, _, _ in MIXTURE])[0]
        tiles = rng.choice(grids)
        tiles += tiles > 1  # the thumbnail
        text = max(16, round(rng.lognormvariate(0.0, 0.7) * middle))
        if tiles * per_tile + text > max_length:
            continue
        ids = torch.cat(
            [
                torch.full((tiles * per_tile,), config.image_token_id),
                torch.randint(3, config.image_start_token_id, (text,), generator=words),
            ]
        )
        samples.append(
            {
                "input_ids": ids,
                "labels": torch.where(torch.arange(len(ids)) < len(ids) - text // 2, -100, ids),
                "pixel_values": torch.zeros(tiles, per_tile, PATCH_DIM, dtype=torch.uint8),
            }
        )
    return samples


def run_packing(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    count: int | None = None,
    rows: int = 8,
    max_length: int = 4096,
    seconds: float = 60.0,
    model: Any = None,
) -> dict[str, Any]:
    """The same `count` samples (default: 64, on a CPU 24), forward and backward: `rows` at a time padded, or in packs.

    Padded batches come in random order, as data comes, and sorted by length, which is the best that padding can do (and
    no longer a random order).
    """
    from ..training.data import Collator, PackCollator
    from ..training.loading import pack_first_fit_decreasing

    ours = model if model is not None else build(preset_config(preset, layers), place)
    config = ours.config
    count = count or (64 if place.is_cuda else 24)
    samples = mixture_samples(count, config, max_length)
    lengths = [len(sample["input_ids"]) for sample in samples]
    pad, packs = Collator(0), pack_first_fit_decreasing(lengths, max_length)
    by_length = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    join = PackCollator(0)
    batches = {
        "packed": [join([[samples[i] for i in pack]]) for pack in packs],
        "padded": [pad(part) for part in _parts(samples, rows)],
        "sorted": [pad(part) for part in _parts(by_length, rows)],
    }
    ours.train()

    def step(name: str) -> None:
        for batch in batches[name]:
            inputs = {key: value.to(place.device) for key, value in batch.items() if key != "loss_weights"}
            ours(**inputs, use_cache=False).loss.backward()
        ours.zero_grad(set_to_none=True)

    times = interleave({name: lambda name=name: step(name) for name in batches}, place, rounds=5, seconds=seconds)  # type: ignore[misc]
    ours.eval()
    tokens = sum(lengths)
    slots = {name: sum(batch["input_ids"].numel() for batch in parts) for name, parts in batches.items()}
    what = f"tokens/s packed to {max_length:,}, {count} samples of {min(lengths)} to {max(lengths)} tokens"
    results = []
    for name, peer in (("padded", f"padded, {rows} at a time"), ("sorted", "padded, sorted by length")):
        results.append(
            row(
                what,
                peer,
                times[name],
                times["packed"],
                **({"at_least": 1.5} if name == "padded" else {}),
                note=f"{tokens / median(times['packed']):,.0f} against {tokens / median(times[name]):,.0f} tokens/s; "
                f"filled {tokens / slots['packed']:.0%} against {tokens / slots[name]:.0%}",
            )
        )
    return {
        "rows": results,
        "settings": {
            "preset": preset,
            "layers": config.text_config.num_hidden_layers,
            "samples": count,
            "tokens": tokens,
            "packs": len(packs),
        },
    }


def _parts(samples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [samples[first : first + size] for first in range(0, len(samples), size)]


# --------------------------------------------------------------------------------------------------------------- memory


def run_memory(place: Place, *, preset: str = "2b", layers: int | None = None, rounds: int = 2) -> dict[str, Any]:
    """Peak memory of two AdamW steps of 1,024 tokens, what S1.1 trains against everything, each in its own process."""
    peaks: dict[str, list[float]] = {mode: [] for mode in MEMORY_GROUPS}
    for i in range(rounds):
        for mode in sorted(peaks, reverse=bool(i % 2)):
            found = run_child(_MODULE, mode, preset, str(layers or ""), place.device.type)
            peaks[mode].append(found["peak_bytes"])
    shares = [a / b for a, b in zip(peaks["s1_1"], peaks["full"], strict=True)]
    return {
        "rows": [
            {
                "what": "peak memory of S1.1, weights, gradients and AdamW's state in the place's dtype",
                "against": "full tuning",
                "ratio": median(shares),
                "iqr": list(quartiles(shares)),
                "note": f"{median(peaks['s1_1']) / 1e9:.2f} against {median(peaks['full']) / 1e9:.2f} GB",
            }
        ],
        "settings": {"preset": preset, "layers": layers, "tokens": sum(MEMORY_TOKENS)},
    }


def _measure_memory(mode: str, preset: str, layers: str, device: str) -> int:
    from ..training.groups import train_only
    from .measure import choose_place

    place = choose_place(device)
    config = preset_config(preset, int(layers) if layers else None)
    model = build(config, place).train()
    train_only(model, MEMORY_GROUPS[mode])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    visual, text = MEMORY_TOKENS
    ids = torch.cat([torch.full((visual,), config.image_token_id), torch.arange(3, 3 + text)])[None].to(place.device)
    tiles = visual // config.vision_config.tokens_per_tile
    pixels = torch.zeros(tiles, config.vision_config.tokens_per_tile, PATCH_DIM, dtype=torch.uint8)
    for _ in range(2):
        model(ids, pixel_values=pixels.to(place.device), labels=ids.clone(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if place.is_cuda:
        return torch.cuda.max_memory_allocated()
    from .load import peak_memory

    return peak_memory()


# -------------------------------------------------------------------------------------------------------------- loading


def run_loading(*, steps: int = 24, workers: int = 2) -> dict[str, Any]:
    """Share of the training steps spent waiting for data: `sft_llava` on JPEG files, the bundled model, on CUDA if any.

    The first four steps are left out: workers start in them.
    """
    from ..training.run import ROOT, run_stage
    from .preprocess import photograph

    with tempfile.TemporaryDirectory(prefix="mono-internvl-benchmark-") as temporary:
        folder = Path(temporary)
        rng = random.Random(3)
        with (folder / "train.jsonl").open("w", encoding="utf-8") as lines:
            for i in range(96):
                width, height = rng.choice(((640, 480), (480, 640), (1024, 768), (800, 600), (500, 375)))
                photograph(width, height, seed=i).save(folder / f"{i}.jpg", quality=90)
                turns = [
                    {"from": "human", "value": "<image>\nDescribe the image."},
                    {"from": "gpt", "value": "a red circle and a blue star. " * rng.randint(2, 12)},
                ]
                lines.write(json.dumps({"id": i, "image": f"{i}.jpg", "conversations": turns}) + "\n")
        overrides = {
            "model": str(ROOT),
            "data": [{"path": str(folder / "train.jsonl"), "root": str(folder)}],
            "steps": steps,
            "epochs": None,
            "batch_size": 4,
            "accumulation": 1,
            "max_tiles": 3,
            "gradient_checkpointing": False,
            "workers": workers,
            "log_steps": 1,
            "save_steps": 10 * steps,
        }
        run_stage("mono-internvl-2b/sft_llava", overrides, runs=folder / "runs")
        log = json.loads((folder / "runs" / "mono-internvl-2b" / "sft_llava" / "log.json").read_text())
    runtime = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    waits = [entry["data_wait_s"] for entry in log if "data_wait_s" in entry]
    step = (float(runtime) - sum(waits)) / len(waits)
    shares = [wait / (wait + step) for wait in waits[4:]]
    return {
        "rows": [
            {
                "what": f"share of a training step spent waiting for data, {workers} workers, JPEG files",
                "against": "the step",
                "ratio": sum(waits[4:]) / (sum(waits[4:]) + step * len(waits[4:])),
                "iqr": list(quartiles(shares)),
                "seconds": step,
                "note": "bundled nano, batches of 4",
            }
        ],
        "settings": {"steps": steps, "workers": workers},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"peak_bytes": _measure_memory(*sys.argv[1:])}) + "\n")
