"""Steps of S2 (everything trains) on packs of 4,096 tokens, by the project's own trainer: model FLOPs utilisation."""

import gc
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ..common.compiling import uncompile_layers
from ..tiling_mono_internvl import PATCH_DIM
from ..training.backend import choose_backend
from ..training.data import IGNORED, Example
from ..training.groups import train_only
from ..training.loading import Key
from ..training.run import make_arguments, make_trainer
from ..training.stages import Stage, load_stage
from . import flops
from .measure import DATASHEET_FLOPS, Place, median, peak_flops, quartiles, recorded
from .peers import build, preset_config


RECIPE = "mono-internvl-2b/s2_instruction"
LENGTH = 4096
# (visual, text) tokens of the samples of each pack, together LENGTH. As in a run, packs differ in samples and tiles.
PACKS = (
    ((1280, 320), (1280, 320), (768, 128)),
    ((3328, 256), (0, 512)),
    ((768, 128), (768, 128), (1280, 256), (512, 256)),
    ((1792, 256), (1024, 256), (0, 768)),
)
# The first steps compile, and compile once more for what changes.
WARM_UP = 2
ROUNDS = 5


class Mode(NamedTuple):
    """One way to train.

    Attributes:
        layers: "compiled" or "eager".
        attention: the attention backend.
        as_recipe: everything as the recipe has it (float32 weights under bfloat16 autocast, activation checkpointing,
            stochastic depth). Otherwise weights, gradients and AdamW's state are in the place's dtype, and neither
            checkpointing nor stochastic depth is on.
    """

    layers: str
    attention: str
    as_recipe: bool = False

    @property
    def name(self) -> str:
        return "as the recipe" if self.as_recipe else f"{self.layers}, {self.attention}"

    def overrides(self) -> dict[str, Any]:
        """Of the recipe's fields."""
        if self.as_recipe:
            return {}
        compiles = self.layers == "compiled"
        chosen = {"compile": compiles, "attn_implementation": self.attention}
        return {**chosen, "bf16": False, "gradient_checkpointing": False, "drop_path": 0.0}


CUDA_MODES = (
    Mode("compiled", "flex_attention"),
    Mode("eager", "flex_attention"),
    Mode("compiled", "sdpa"),
    Mode("compiled", "flex_attention", as_recipe=True),
)
CPU_MODES = (Mode("eager", "sdpa"),)
# MFU that the output head and the rotation as they are now reached on an H200, with the step of then.
_GOALS = {CUDA_MODES[0]: 0.469, CUDA_MODES[1]: 0.417}


class Samples(Dataset):
    """The samples of `PACKS` in memory, as `Conversations` hands them out: random words, half of each text learnt."""

    skip_bad = False

    def __init__(self, config: Any):
        per_tile = config.vision_config.tokens_per_tile
        generator = torch.Generator().manual_seed(2)
        self.examples: list[Example] = []
        for visual, text in itertools.chain(*PACKS):
            words = torch.randint(3, config.image_start_token_id, (text,), generator=generator)
            ids = torch.cat([torch.full((visual,), config.image_token_id), words])
            shape = (visual // per_tile, per_tile, PATCH_DIM)
            self.examples.append(
                {
                    "input_ids": ids,
                    "labels": torch.where(torch.arange(len(ids)) < visual + text // 2, IGNORED, ids),
                    "pixel_values": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
                }
            )

    def __getitem__(self, key: Key) -> tuple[Key, Example]:
        return key, self.examples[key.record]


def units() -> Iterator[list[Key]]:
    """`PACKS` over and over, as keys of `Samples`."""
    numbers = iter(range(sum(len(pack) for pack in PACKS)))
    keys = [[Key(0, next(numbers)) for _ in pack] for pack in PACKS]
    return itertools.cycle(keys)


def step_flops(config: Any, packs: list[tuple[tuple[int, int], ...]]) -> int:
    """Of one optimiser step on `packs`; the head only where something is learnt, as the trainer computes it."""
    samples = list(itertools.chain(*packs))
    lengths = [visual + text for visual, text in samples]
    targets = sum(text - text // 2 for _, text in samples)
    return flops.training_flops(config, lengths, sum(visual for visual, _ in samples), targets)


class StepTimes(TrainerCallback):
    """Seconds of each step, from the end of the one before: data, forward, backward, optimiser."""

    def __init__(self, place: Place, seconds: float):
        self.place, self.seconds = place, seconds
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.place.wait()
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now
        measured = self.times[WARM_UP:]
        if len(measured) >= min(3, ROUNDS) and sum(measured) > self.seconds:
            control.should_training_stop = True


def train_steps(model: Any, stage: Stage, place: Place, rows: int, seconds: float) -> list[float]:
    """Seconds of up to ROUNDS steps after the WARM_UP ones, `rows` packs a micro-batch."""
    backend = choose_backend(stage)
    if backend.attention is not None:
        model.set_attn_implementation(backend.attention)
    train_only(model, stage.trains)
    clock = StepTimes(place, seconds)
    with tempfile.TemporaryDirectory(prefix="mono-internvl-benchmark-") as folder:
        steps = stage.steps or 0
        trainer = make_trainer(
            stage,
            model,
            backend,
            Samples(model.config),
            units,
            make_arguments(stage, Path(folder), steps, rows, cuda=place.is_cuda, save_strategy="no", report_to=[]),
            pad_token_id=0,
            tokens_per_tile=model.config.vision_config.tokens_per_tile,
            callbacks=[clock],
        )
        try:
            trainer.train()
        finally:
            # What failed half-way through leaves its gradients, its layers' graphs and its optimiser behind.
            uncompile_layers(model)
            trainer.accelerator.free_memory()
            model.zero_grad(set_to_none=True)
    return clock.times[WARM_UP:]


def run_train(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    rows: int = 2,
    accumulation: int = 4,
    seconds: float = 5.0,
    model: Any = None,
    modes: tuple[Mode, ...] | None = None,
) -> dict[str, Any]:
    """What `mono-internvl train` does at every step, on packs made beforehand.

    On CUDA attention is FlexAttention, which skips what belongs to other samples, with the layers as they are and
    compiled; SDPA sample by sample, compiled; and everything as the recipe has it.

    Args:
        rows, accumulation: packs of a micro-batch, micro-batches of a step.
        modes: default: `CUDA_MODES` or `CPU_MODES`.
    """
    ours = model if model is not None else build(preset_config(preset, layers), place)
    config, before = ours.config, ours.config._attn_implementation
    per_step = rows * accumulation
    tokens = per_step * LENGTH
    order = list(itertools.islice(itertools.cycle(PACKS), per_step * (WARM_UP + ROUNDS)))
    work = [step_flops(config, order[step : step + per_step]) for step in range(0, len(order), per_step)][WARM_UP:]
    peak, source = _peak(place, config.text_config, rows * LENGTH)
    shared = {
        **{"max_length": LENGTH, "batch_size": per_step, "accumulation": accumulation},
        **{"steps": WARM_UP + ROUNDS, "workers": _workers(place)},
    }

    results: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    for mode in modes or (CUDA_MODES if place.is_cuda else CPU_MODES):
        stage = load_stage(RECIPE, {**shared, **mode.overrides()})
        times: list[float] = []
        if place.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        with recorded(notes, mode.name):
            # Nobody else keeps the float32 model.
            model = build(config, Place(place.device, torch.float32)) if mode.as_recipe else ours
            times = train_steps(model, stage, place, rows, seconds)
        model = ours
        gc.collect()
        memory = torch.cuda.max_memory_allocated() if place.is_cuda else None
        place.release()
        if not times:
            continue
        shares = [amount / value / peak for amount, value in zip(work, times, strict=False)]
        speed = f"{tokens / median(times):,.0f} tokens/s, {median(shares) * peak / 1e12:.3g} TFLOP/s"
        results.append(
            {
                "what": f"S2 step, {tokens:,} tokens in packs of {LENGTH:,}: MFU",
                "against": f"{peak / 1e12:.3g} TFLOP/s, {source}",
                "ratio": median(shares),
                "iqr": list(quartiles(shares)),
                "seconds": median(times),
                **({"at_least": _GOALS[mode]} if mode in _GOALS else {}),
                "mode": mode.name,
                "tokens_per_second": tokens / median(times),
                "flops": work[0],
                "peak_memory_bytes": memory,
                "note": f"{mode.name}: {choose_backend(stage)}; {speed}" if mode.as_recipe else f"{mode.name}; {speed}",
            }
        )
    ours.eval().requires_grad_(True)
    ours.set_attn_implementation(before)
    return {
        "rows": results,
        "not_run": notes,
        "settings": {
            "preset": preset,
            "layers": config.text_config.num_hidden_layers,
            "rows": rows,
            "accumulation": accumulation,
            "workers": shared["workers"],
            "peak_memory_bytes": max((row["peak_memory_bytes"] for row in results), default=None)
            if place.is_cuda
            else None,
        },
    }


def _workers(place: Place) -> int:
    """Processes that collate, as the recipe has them where there is room to hand batches over."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2**30
    return 2 if place.is_cuda and roomy else 0


def _peak(place: Place, text: Any, tokens: int) -> tuple[float, str]:
    """FLOP/s that MFU is a share of: the data sheet's, or where there is none, the measured."""
    name = torch.cuda.get_device_name(place.device) if place.is_cuda else ""
    known = next((peak for key, peak in DATASHEET_FLOPS.items() if key in name), None)
    return (known, "data sheet") if known else (peak_flops(place, tokens, flops.product_shapes(text)), "measured")
