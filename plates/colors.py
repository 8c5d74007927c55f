"""Colours of the plate world: a name covers a generous region, and the regions of two names keep a gap."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Sequence

from .words import RGB


PLAIN_SHADES: dict[str, RGB] = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (128, 0, 128),
    "orange": (255, 165, 0),
    "black": (0, 0, 0),
}


def _palette(codes: str) -> tuple[RGB, ...]:
    return tuple((int(code[0:2], 16), int(code[2:4], 16), int(code[4:6], 16)) for code in codes.split())


# Shades that drawing code commonly means by the name: CSS, matplotlib's tab: cycle, flat-design palettes, pastels.
_SHADES: dict[str, tuple[RGB, ...]] = {
    "red": _palette("ff0000 d62728 e74c3c dc143c b22222 c80000 e41a1c cd5c5c f44336 dc3232 ff4040"),
    "green": _palette("008000 00ff00 2ca02c 2ecc71 228b22 32cd32 00c800 4daf4a 90ee90 3cb44b 27ae60"),
    "blue": _palette("0000ff 1f77b4 3498db 4169e1 1e90ff 0000c8 377eb8 6495ed 2196f3 4363d8 000080"),
    "yellow": _palette("ffff00 ffd700 f1c40f ffe119 ffeb3b fff033 f0e442 e6dc00 ffee66 ffdc00 e6c800"),
    "purple": _palette("800080 9467bd 9b59b6 8a2be2 663399 984ea3 911eb4 9370db a020f0 ba55d3 6a0dad"),
    "orange": _palette("ffa500 ff7f0e ff8c00 e67e22 f39c12 ff7f00 ff9800 f58231 ffb347 ff8000 fa8c14"),
    "black": _palette("000000 000000 000000 0a0a0a 141414 1a1a1a 222222 282828 111122 191919 050505"),
}

# Hue in degrees, saturation and value, each (low, high).
_REGIONS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-10, 7), (0.68, 1.0), (0.65, 1.0)),
    "green": ((95, 152), (0.45, 1.0), (0.40, 1.0)),
    "blue": ((203, 242), (0.55, 1.0), (0.50, 1.0)),
    "yellow": ((48, 62), (0.60, 1.0), (0.88, 1.0)),
    "purple": ((268, 303), (0.42, 1.0), (0.45, 0.95)),
    "orange": ((22, 39), (0.78, 1.0), (0.88, 1.0)),
    "black": ((0, 360), (0.0, 0.4), (0.0, 0.15)),
}

_LIGHT_TINTS = _palette("f5f5dc fffff0 e6e6fa d3d3d3 f5f5f5 ffffe0 add8e6 f0fff0 ffe4e1 faf0e6 f0f8ff")
_DARK_TINTS = _palette("222222 333333 191970 2f4f4f 404040 1e1e28 14141e 2b2b3b 1c2833 303030 28201c")


def _jitter(rng: random.Random, color: RGB, amount: int) -> RGB:
    r, g, b = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)
    return r, g, b


def random_shade(rng: random.Random, name: str) -> RGB:
    draw = rng.random()
    if draw < 0.2:
        return PLAIN_SHADES[name]
    if draw < 0.65:
        return _jitter(rng, rng.choice(_SHADES[name]), rng.choice((0, 0, 8)))
    (h0, h1), (s0, s1), (v0, v1) = _REGIONS[name]
    r, g, b = colorsys.hsv_to_rgb(rng.uniform(h0, h1) % 360 / 360, rng.uniform(s0, s1), rng.uniform(v0, v1))
    return round(r * 255), round(g * 255), round(b * 255)


def random_background(rng: random.Random) -> RGB:
    draw = rng.random()
    if draw < 0.32:
        return 255, 255, 255
    if draw < 0.46:  # near white to light gray
        level = rng.randint(200, 254)
        return _jitter(rng, (level, level, level), rng.choice((0, 0, 3)))
    if draw < 0.62:  # light tint
        if rng.random() < 0.4:
            return rng.choice(_LIGHT_TINTS)
        return rng.randint(205, 255), rng.randint(205, 255), rng.randint(205, 255)
    if draw < 0.75:
        level = rng.randint(0, 25)
        return (0, 0, 0) if rng.random() < 0.5 else (level, level, level)
    if draw < 0.88:  # dark gray
        level = rng.randint(25, 85)
        return level, level, level
    if rng.random() < 0.4:
        return rng.choice(_DARK_TINTS)
    return rng.randint(5, 70), rng.randint(5, 70), rng.randint(5, 70)


def _luminance(color: RGB) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def contrasts(color: RGB, name: str, background: RGB) -> bool:
    """True where a person sees the item at once and would still give it this name."""
    if name == "black":
        return _luminance(background) > 130
    differences = [abs(a - b) for a, b in zip(color, background, strict=True)]
    return max(differences) >= 95 and sum(differences) >= 120


def contrasting_shade(rng: random.Random, background: RGB, names: Sequence[str]) -> tuple[str, RGB]:
    while True:
        name = rng.choice(names)
        for _ in range(6):
            shade = random_shade(rng, name)
            if contrasts(shade, name, background):
                return name, shade
