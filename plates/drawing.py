"""Draws a plate by Pillow, about a millisecond a picture."""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFilter

from .colors import PLAIN_SHADES
from .fonts import ink
from .words import RGB, Item, Plate, Points


def draw_plate(plate: Plate, rng: random.Random, *, damage: bool = True) -> Image.Image:
    """The plate's picture, mode RGB. `rng` chooses anti-aliasing, outlines and, with `damage`, blur, noise or JPEG."""
    image = Image.new("RGB", (plate.width, plate.height), plate.background)
    scale = rng.choices((1, 2, 3, 4), (15, 30, 35, 20))[0]  # 1 draws hard edges
    outline = rng.choice(("black", "white", "darker", "darker")) if rng.random() < 0.2 else None
    thickness = rng.uniform(0.015, 0.06)
    for item in plate.items:
        fill = item.fill or PLAIN_SHADES[item.color]
        if item.kind == "number":
            _draw_number(image, item, fill, rng)
        else:
            ink = _outline_ink(outline, fill, plate.background)
            _draw_shape(image, item, fill, scale, ink, thickness)
    return _damage(image, rng) if damage else image


def _outline_ink(style: str | None, fill: RGB, background: RGB) -> RGB | None:
    """The outline's colour; none where it would melt into the background and eat into the shape."""
    if style is None:
        return None
    if style == "darker":
        ink = int(fill[0] * 0.6), int(fill[1] * 0.6), int(fill[2] * 0.6)
    else:
        ink = (0, 0, 0) if style == "black" else (255, 255, 255)
    visible = max(abs(a - b) for a, b in zip(ink, background, strict=True)) >= 70
    return ink if visible else None


def _draw_shape(image: Image.Image, item: Item, fill: RGB, scale: int, outline: RGB | None, thickness: float) -> None:
    """Pastes the shape through a mask drawn `scale` times larger, which covers no more than the shape."""
    x1, y1, x2, y2 = item.box
    left, top = math.floor(x1) - 1, math.floor(y1) - 1
    columns, rows = math.ceil(x2) + 1 - left, math.ceil(y2) + 1 - top
    line = max(1.0, thickness * min(x2 - x1, y2 - y1)) if outline else 0.0
    # With an outline the shape shrinks by half the line on every side, so that the box stays true.
    shrink = 1 - line / max(x2 - x1, y2 - y1)
    mid_x, mid_y = item.center

    def place(x: float, y: float) -> tuple[float, float]:
        # Pillow's coordinates name pixel centres, ours edges: hence the half.
        return (
            (mid_x + (x - mid_x) * shrink - left) * scale - 0.5,
            (mid_y + (y - mid_y) * shrink - top) * scale - 0.5,
        )

    corners = [place(x, y) for x, y in item.points or _upright(item)]
    round_box = (*place(x1, y1), *place(x2, y2))
    mask = Image.new("L", (columns * scale, rows * scale))
    draw = ImageDraw.Draw(mask)
    if item.kind == "circle":
        draw.ellipse(round_box, fill=255)
    else:
        draw.polygon(corners, fill=255)
    image.paste(fill, (left, top), mask.reduce(scale) if scale > 1 else mask)
    if outline is None:
        return
    mask = Image.new("L", (columns * scale, rows * scale))
    draw = ImageDraw.Draw(mask)
    width = max(1, round(line * scale))
    if item.kind == "circle":
        draw.ellipse(round_box, outline=255, width=width)
    else:
        draw.line([*corners, corners[0], corners[1]], fill=255, width=width, joint="curve")
    image.paste(outline, (left, top), mask.reduce(scale) if scale > 1 else mask)


@lru_cache(maxsize=1)
def _upright_units() -> dict[str, Points]:
    star = []
    for k in range(10):
        radius = 0.382 if k % 2 else 1.0
        star.append((radius * math.sin(math.pi * k / 5), -radius * math.cos(math.pi * k / 5)))
    return {
        "circle": (),
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1), (1, 1), (-1, 1)),
        "star": tuple(star),
    }


def _upright(item: Item) -> Points:
    """Corners for an item that carries none: the plain upright shape, stretched to its box."""
    unit = _upright_units()[item.kind]
    if not unit:
        return ()
    xs, ys = [x for x, _ in unit], [y for _, y in unit]
    x1, y1, x2, y2 = item.box
    return tuple(
        (
            x1 + (x - min(xs)) / (max(xs) - min(xs)) * (x2 - x1),
            y1 + (y - min(ys)) / (max(ys) - min(ys)) * (y2 - y1),
        )
        for x, y in unit
    )


def _draw_number(image: Image.Image, item: Item, fill: RGB, rng: random.Random) -> None:
    x1, y1, x2, y2 = (round(value) for value in item.box)
    extent = max(1, x2 - x1), max(1, y2 - y1)
    antialias = rng.random() > 0.1
    mask = ink(item.text, item.font, item.font_size or max(8, round(extent[1] / 0.73)), antialias)
    if rng.random() < 0.15:  # slanted: more letterforms than there are fonts
        slant = rng.uniform(-0.12, 0.25)
        reach = abs(slant) * mask.height
        shift = -reach if slant > 0 else 0.0
        mask = mask.transform(
            (math.ceil(mask.width + reach), mask.height),
            Image.Transform.AFFINE,
            (1, slant, shift, 0, 1, 0),
            Image.Resampling.BILINEAR,
        )
        mask = mask.crop(mask.getbbox())
    if mask.size != extent:
        mask = mask.resize(extent, Image.Resampling.BILINEAR if antialias else Image.Resampling.NEAREST)
    image.paste(fill, (x1, y1), mask)


def _damage(image: Image.Image, rng: random.Random) -> Image.Image:
    """What pictures suffer on the way, in one of six: blur, noise, JPEG. Never enough to change an answer."""
    draw = rng.random()
    if draw < 0.05:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if draw < 0.1:
        # Pillow's effect_noise draws from C's own generator, which no seed of ours reaches.
        noise = Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))
        return Image.blend(image, noise, rng.uniform(0.01, 0.06))
    if draw < 0.16:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(45, 95))
        return Image.open(buffer).convert("RGB")
    return image
