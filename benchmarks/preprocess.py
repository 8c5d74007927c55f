"""Picture -> `pixel_values`, against the PIL resizes alone and against the plain per-tile recipe."""

from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..image_processing_mono_internvl import IMAGENET_MEAN, IMAGENET_STD, MonoInternVLImageProcessor
from .measure import Place, interleave, row
from .peers import preset_config


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure at every scale, the same on every run."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / (7 + 5 * c) + y / 31) + np.sin(y / (11 + 3 * c) - x / 53) for c in range(3)]
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) * 50 + 128 + noise).clip(0, 255).astype(np.uint8))


def resizes(picture: Image.Image, cols: int, rows: int, side: int) -> tuple[Image.Image, Image.Image]:
    """What no recipe can leave out: the picture at its grid's size, and the thumbnail."""
    grid = picture.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
    return grid, picture.resize((side, side), Image.Resampling.BICUBIC)


def per_tile_recipe(picture: Image.Image, cols: int, rows: int, side: int) -> np.ndarray:
    """The recipe of the model cards: resize, crop tile by tile, scale, normalise, stack; [tiles, 3, side, side]."""
    grid, thumbnail = resizes(picture, cols, rows, side)
    tiles = [grid.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(rows) for x in range(cols)]
    mean, std = (np.asarray(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    tiles = [*tiles, thumbnail] if len(tiles) > 1 else tiles
    return np.stack([((np.asarray(tile, np.float32) / 255 - mean) / std).transpose(2, 0, 1) for tile in tiles])


def run_preprocess(
    place: Place,
    *,
    preset: str = "2b",
    sizes: tuple[tuple[int, int], ...] = ((1600, 1200), (4000, 3000)),
    seconds: float = 20.0,
) -> dict[str, Any]:
    """12 tiles (of the preset's size) and the thumbnail of 4:3 pictures; on CUDA the uint8 path ends on the device,
    normalised there.
    """
    import torch

    from ..configuration_mono_internvl import MonoInternVLVisionConfig
    from ..vision_mono_internvl import MonoInternVLVisionEmbeddings

    processor = MonoInternVLImageProcessor(tile_size=preset_config(preset).vision_config.image_size)
    side = processor.tile_size
    embeddings = MonoInternVLVisionEmbeddings(MonoInternVLVisionConfig(hidden_size=4)).to(place.device)

    def to_device(picture: Image.Image) -> torch.Tensor:
        raw = processor(picture, do_normalize=False, return_tensors="pt")["pixel_values"]
        return embeddings.normalize(raw.to(place.device)) if place.is_cuda else raw

    rows = []
    for width, height in sizes:
        picture = photograph(width, height)
        grid = processor.grid_of(width, height)
        times = interleave(
            {
                "resizes": partial(resizes, picture, *grid, side),
                "float32": partial(processor, picture, return_tensors="pt"),
                "uint8": partial(to_device, picture),
                "per tile": partial(per_tile_recipe, picture, *grid, side),
            },
            place,
            rounds=31,
            seconds=seconds,
        )
        what = f"{width}x{height}, {grid[0] * grid[1]} + 1 tiles"
        uint8 = f"{what}, uint8" + (" to the device, normalised there" if place.is_cuda else "")
        rows += [
            row(what, "PIL resizes alone", times["float32"], times["resizes"], at_most=1.25, path="float32"),
            row(uint8, "PIL resizes alone", times["uint8"], times["resizes"], at_most=1.1, path="uint8"),
            row(what, "plain per-tile recipe", times["float32"], times["per tile"], at_most=1.0, path="float32"),
        ]
    return {"rows": rows, "settings": {"tile_size": side, "max_tiles": processor.max_tiles}}
