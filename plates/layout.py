"""Layouts of plates and sheets: what is where, in which colour, before there are pixels."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from .colors import contrasting_shade, contrasts, random_background, random_shade
from .fonts import ink, training_fonts
from .words import COLORS, POSITIONS, RGB, SHAPES, Box, Item, Plate, Points


_ASPECTS = ((0.34, 1.0), (0.14, 4 / 3), (0.1, 1.5), (0.08, 16 / 9))  # the rest is uniform: to 2, and to 3 in one of ten
_COUNT_WEIGHTS = (35, 21, 18, 13, 13)
# Sizes of a number's font over the shorter side of its room: alone in it, and beside shapes.
_ALONE, _BESIDE = (0.16, 0.95), (0.16, 0.5)


def check_size(size: Sequence[int]) -> None:
    """Raises ValueError unless `size` is two sides in pixels, 32 <= smallest <= largest."""
    if len(size) != 2 or not 32 <= size[0] <= size[1]:
        raise ValueError(f"size must be (smallest, largest) side in pixels, at least 32, not {size}")


def _size(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    aspect = _pick(rng, (*_ASPECTS, (0.24, rng.uniform(1, 2)), (0.1, rng.uniform(2, 3))))
    aspect = min(aspect, high / low)
    short = rng.uniform(low, high / aspect)
    width, height = max(low, round(short * aspect)), max(low, round(short))
    return (width, height) if rng.random() < 0.6 else (height, width)


def _slots(rng: random.Random, count: int) -> list[tuple[float, float]] | None:
    """Centres (shares of width and height) for a picture's items by one plan, or None for each at random."""
    plan = rng.random()
    if count == 1:
        if plan < 0.45:
            return [(0.5, 0.5)]
        if plan < 0.9:
            return [_named_slot(rng, rng.choice(POSITIONS))]
        return None
    if plan < 0.5:
        return [_named_slot(rng, name) for name in rng.sample(POSITIONS, count)] if count <= 5 else None
    if plan < 0.62:  # a row or a column
        at = rng.choice((0.5, 0.5, rng.uniform(0.25, 0.75)))
        row = [((k + 0.5) / count, at) for k in range(count)]
        return row if rng.random() < 0.7 else [(y, x) for x, y in row]
    if plan < 0.7:  # cells of a grid
        columns = 2 if count <= 4 else 3
        rows = 2
        cells = [((c + 0.5) / columns, (r + 0.5) / rows) for r in range(rows) for c in range(columns)]
        return rng.sample(cells, count)
    return None


def _named_slot(rng: random.Random, name: str) -> tuple[float, float]:
    if name == "center":
        return 0.5 + rng.choice((0, rng.uniform(-0.09, 0.09))), 0.5 + rng.choice((0, rng.uniform(-0.09, 0.09)))
    x, y = rng.choice(((0.25, 0.25), (0.2, 0.2), (rng.uniform(0.1, 0.36), rng.uniform(0.1, 0.36))))
    return (x if "left" in name else 1 - x), (y if "top" in name else 1 - y)


def sample_plate(
    rng: random.Random,
    *,
    max_shapes: int = 5,
    with_number: float = 0.3,
    size: tuple[int, int] = (96, 320),
    count_weights: Sequence[float] = _COUNT_WEIGHTS,
    one_kind: float = 0.45,
    odd_one: float = 0.0,
    number_size: tuple[float, float] | None = None,
    fonts: tuple[tuple[str, ...], ...] | None = None,
) -> Plate:
    """A random layout. What finds no room is left out, so that a plate may be empty.

    Args:
        rng: the only source of randomness.
        max_shapes: at most this many shapes, 0 to 5; 0 gives numbers alone.
        with_number: share of plates with a printed number, half of them alone, the others beside 1 to 3 shapes.
        size: smallest and largest side in pixels.
        count_weights: how often plates have 1 to 5 shapes.
        one_kind: share of the plates of several shapes whose shapes are all of one kind.
        odd_one: share of those of three shapes and more in which one shape is of another kind all the same.
        number_size: smallest and largest size of a number's font over the picture's shorter side (at least 14 pixels
            all the same); default: 0.16 to 0.95 for a number alone, to 0.5 beside shapes.
        fonts: families of font files, as `training_fonts` gives them (the default).

    Raises:
        ValueError: `max_shapes` is not in 0..5, or `size` is not 32 <= smallest <= largest.
    """
    if not 0 <= max_shapes <= 5:
        raise ValueError(f"max_shapes must be 0 to 5, not {max_shapes}")
    check_size(size)
    width, height = _size(rng, *size)
    short = min(width, height)
    background = random_background(rng)
    has_number = rng.random() < with_number or max_shapes == 0
    shape_count = rng.choices(range(1, max_shapes + 1), count_weights[:max_shapes])[0] if max_shapes else 0
    if has_number:
        shape_count = 0 if rng.random() < 0.5 else min(shape_count, 3)
    count = shape_count + has_number
    slots = _slots(rng, count)
    gap = max(2.0, 0.015 * short)
    same_kind = rng.choice(SHAPES) if shape_count > 1 and rng.random() < one_kind else None
    one_color = rng.choice(COLORS) if shape_count > 1 and rng.random() < 0.12 else None
    low, high = {1: (0.12, 0.62), 2: (0.1, 0.44), 3: (0.09, 0.36)}.get(count, (0.08, 0.3))
    shared = rng.uniform(low, high) if rng.random() < 0.4 else None

    items: list[Item] = []
    number_index = rng.randrange(count) if has_number else -1
    # Nothing is drawn from `rng` for a share of 0, so that plates without it stay what they were.
    has_odd = odd_one > 0 and same_kind is not None and shape_count > 2 and rng.random() < odd_one
    odd_index = rng.choice([index for index in range(count) if index != number_index]) if has_odd else -1
    for index in range(count):
        name, fill = contrasting_shade(rng, background, COLORS)
        if one_color is not None and index != number_index:
            for _ in range(8):
                shade = random_shade(rng, one_color)
                if contrasts(shade, one_color, background):
                    name, fill = one_color, shade
                    break
        slot = slots[index] if slots else None
        if index == number_index:
            sizes = number_size or (_ALONE if count == 1 else _BESIDE)
            item = _place_number(rng, items, width, height, gap, name, fill, slot, sizes=sizes, fonts=fonts)
        else:
            kind = same_kind or rng.choice(SHAPES)
            if index == odd_index:
                kind = rng.choice([other for other in SHAPES if other != kind])
            side = max(14.0, short * (shared if shared is not None else rng.uniform(low, high)))
            item = _place_shape(rng, items, width, height, gap, kind, side, name, fill, slot)
        if item is not None:
            items.append(item)
    return Plate(width, height, background, tuple(items))


def sample_sheet(rng: random.Random, *, size: tuple[int, int] = (96, 320), numbers: float = 0.6) -> Plate:
    """A sheet: up to 16 shapes and numbers in the cells of a grid, in reading order, one at least.

    Nothing is asked about a sheet but what stands on it. A plate shows three digits at most, a sheet about ten, and
    what costs is reading the picture.

    Args:
        rng: the only source of randomness.
        size: smallest and largest side in pixels.
        numbers: share of numbers among the items.
    """
    width, height = _size(rng, *size)
    background = random_background(rng)
    columns, rows = rng.choice((1, 2, 2, 3, 3, 4)), rng.choice((1, 2, 2, 3, 3, 4))
    cell = width // columns, height // rows
    gap = max(2.0, 0.015 * min(cell))
    items: list[Item] = []
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.1:
                continue
            name, fill = contrasting_shade(rng, background, COLORS)
            if rng.random() < numbers:
                item = _place_number(rng, (), *cell, gap, name, fill, None, sizes=_ALONE, fonts=None)
            else:
                side = max(12.0, min(cell) * rng.uniform(0.35, 0.85))
                item = _place_shape(rng, (), *cell, gap, rng.choice(SHAPES), side, name, fill, None)
            if item is not None:
                items.append(_moved(item, column * cell[0], row * cell[1]))
    # Every cell was left free: another one.
    return Plate(width, height, background, tuple(items)) if items else sample_sheet(rng, size=size, numbers=numbers)


def _moved(item: Item, x: float, y: float) -> Item:
    left, top, right, bottom = item.box
    points = tuple((a + x, b + y) for a, b in item.points)
    return dataclasses.replace(item, box=(left + x, top + y, right + x, bottom + y), points=points)


def _free_spot(
    rng: random.Random,
    items: Sequence[Item],
    width: int,
    height: int,
    gap: float,
    extent: tuple[float, float],
    slot: tuple[float, float] | None,
) -> Box | None:
    """A place for a box of this extent, near the slot if there is one, apart from the items; None if none was found."""
    w, h = extent
    margin = min(gap, 3.0)
    if w > width - 2 * margin or h > height - 2 * margin:
        return None
    for attempt in range(30):
        if slot is not None and attempt < 12:
            spread = 0.008 * attempt
            x = (slot[0] + rng.uniform(-spread, spread)) * width - w / 2
            y = (slot[1] + rng.uniform(-spread, spread)) * height - h / 2
            x = min(max(x, margin), width - margin - w)
            y = min(max(y, margin), height - margin - h)
        else:
            x = rng.uniform(margin, width - margin - w)
            y = rng.uniform(margin, height - margin - h)
        if all(
            x > box[2] + gap or x + w < box[0] - gap or y > box[3] + gap or y + h < box[1] - gap
            for box in (item.box for item in items)
        ):
            return x, y, x + w, y + h
    return None


def _place_shape(
    rng: random.Random,
    items: Sequence[Item],
    width: int,
    height: int,
    gap: float,
    kind: str,
    side: float,
    name: str,
    fill: RGB,
    slot: tuple[float, float] | None,
) -> Item | None:
    unit = _polygon(rng, kind)
    unit_w, unit_h = _extent(unit)
    for _ in range(6):
        box = _free_spot(rng, items, width, height, gap, (unit_w * side, unit_h * side), slot)
        if box is not None:
            mid_x, mid_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            points = tuple((mid_x + x * side, mid_y + y * side) for x, y in unit)
            return Item(kind, name, box, fill=fill, points=points)
        side = max(12.0, side * 0.8)
    return None


def _place_number(
    rng: random.Random,
    items: Sequence[Item],
    width: int,
    height: int,
    gap: float,
    name: str,
    fill: RGB,
    slot: tuple[float, float] | None,
    *,
    sizes: tuple[float, float],
    fonts: tuple[tuple[str, ...], ...] | None,
) -> Item | None:
    digits = rng.choice((1, 2, 3, 3))
    text = str(rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits))
    path = rng.choice(rng.choice(fonts or training_fonts()))
    short = min(width, height)
    size = max(14.0, short * rng.uniform(*sizes))  # digits are ~0.73 of it
    stretch = rng.uniform(0.82, 1.22) if rng.random() < 0.35 else 1.0
    for _ in range(8):
        # Large sizes go in steps, so that the font cache is hit.
        size = round(size) if size < 48 else round(size / 4) * 4
        ink_w, ink_h = ink(text, path, int(size)).size
        ink_w = max(2, round(ink_w * stretch))
        box = _free_spot(rng, items, width, height, gap, (ink_w, ink_h), slot)
        if box is not None:
            x, y = int(box[0]), int(box[1])  # glyphs are drawn on the pixel grid
            return Item("number", name, (x, y, x + ink_w, y + ink_h), text, fill, (), path, int(size))
        size = max(10, size * 0.8)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Geometry of a unit shape
# ---------------------------------------------------------------------------------------------------------------------


def _polygon(rng: random.Random, kind: str) -> Points:
    """Corners of a shape of unit size (longer side of the bounding box 1, centred on 0); none for a circle."""
    if kind == "circle":
        return ()
    if kind == "square":
        corners = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
        turn = _pick(rng, ((0.76, 0.0), (0.13, rng.uniform(-15, 15)), (0.05, 45.0), (0.06, rng.uniform(-45, 45))))
    elif kind == "triangle":
        half = 0.5 / _pick(rng, ((0.5, math.sqrt(3) / 2), (0.3, 1.0), (0.2, rng.uniform(0.7, 1.35))))
        corners = [(0.0, -0.5), (half, 0.5), (-half, 0.5)]
        if rng.random() < 0.06:  # a right angle
            corners = [(-0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
        turn = _pick(
            rng,
            (
                (0.68, 0.0),
                (0.08, rng.uniform(-15, 15)),
                (0.1, 180.0),
                (0.06, rng.choice((90.0, -90.0))),
                (0.08, rng.uniform(0, 360)),
            ),
        )
    else:
        tips = int(_pick(rng, ((0.94, 5), (0.04, 6), (0.02, 4))))
        inner = _pick(rng, ((0.35, 0.382), (0.2, 0.5), (0.1, 0.4), (0.35, rng.uniform(0.35, 0.55))))
        if tips == 4:  # wider and it would be a square on its corner
            inner = rng.uniform(0.3, 0.4)
        corners = []
        for k in range(2 * tips):
            radius = inner if k % 2 else 1.0
            corners.append((radius * math.sin(math.pi * k / tips), -radius * math.cos(math.pi * k / tips)))
        turn = _pick(rng, ((0.66, 0.0), (0.16, rng.uniform(-18, 18)), (0.04, 180.0), (0.14, rng.uniform(0, 360))))
    sin, cos = math.sin(math.radians(turn)), math.cos(math.radians(turn))
    corners = [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    scale = 1 / max(max(xs) - min(xs), max(ys) - min(ys))
    mid_x, mid_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return tuple(((x - mid_x) * scale, (y - mid_y) * scale) for x, y in corners)


def _pick(rng: random.Random, options: Sequence[tuple[float, float]]) -> float:
    draw = rng.random() * sum(weight for weight, _ in options)
    for weight, value in options:
        draw -= weight
        if draw <= 0:
            return value
    return options[-1][1]


def _extent(points: Points) -> tuple[float, float]:
    """Width and height of unit corners."""
    if not points:
        return 1.0, 1.0
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return max(xs) - min(xs), max(ys) - min(ys)
