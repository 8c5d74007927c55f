"""The plate world: small pictures of plain shapes and printed numbers, with questions and answers, drawn fast.

    plate = sample_plate(random.Random(0))     a layout: what is where, in which colour (no pixels yet)
    image = draw_plate(plate, rng)             its picture, PIL RGB, about a millisecond
    for qa in questions(plate, rng): ...       every question that has one unambiguous answer

The nano model must answer pictures drawn by *other* code, so everything that such code may choose is varied here: size
and aspect ratio, shade, background, rotation, star geometry, outline, anti-aliasing, font and mild damage. What a
question leaves open is never varied: items do not overlap, lie inside the picture, contrast with the background, and a
question is asked only where its answer is unique.

Everything random comes from the `random.Random` passed in: one seed gives one plate, one picture and one list of
questions, on machines with the same fonts and the same Pillow. Fonts in HELD_OUT_FONTS are left to the evaluation.
"""

from __future__ import annotations

import colorsys
import dataclasses
import io
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont


RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]
Points = tuple[tuple[float, float], ...]

# ---------------------------------------------------------------------------------------------------------------------
# Words (the evaluation shares these and nothing else)
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black")
POSITIONS = ("top left", "top right", "bottom left", "bottom right", "center")
CATEGORIES = ("shape", "color", "count", "number", "position", "caption", "box")
COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five"}

CANONICAL = {
    "shape": "What shape is in the image?",
    "color": "What color is the {shape}?",
    "count": "How many {shape}s are there?",
    "number": "What number is written in the image?",
    "position": "Where is the {color} {shape}?",
    "caption": "Describe the image.",
    "box": "Please provide the bounding box coordinate of the region this sentence describes: <ref>{ref}</ref>",
}

# The first entry of each row is the canonical wording; the others are asked in CANONICAL_SHARE's remainder.
CANONICAL_SHARE = 0.6
_PHRASES: dict[str, tuple[str, ...]] = {
    "shape": (
        CANONICAL["shape"],
        "Which shape do you see?",
        "What shape is shown in the picture?",
        "What shape is this?",
        "Name the shape in the image.",
        "Which shape is in the picture?",
        "What is the shape in the image?",
        "Tell me the shape.",
    ),
    "shape_by_color": (
        "What shape is {color}?",
        "What shape is the {color} object?",
        "Which shape is {color}?",
        "What is the shape of the {color} object?",
        "Name the {color} shape.",
    ),
    "shape_by_position": (
        "What shape is in the {position}?",
        "Which shape is at the {position} of the image?",
        "Name the shape in the {position}.",
        "What shape do you see in the {position} of the picture?",
        "Tell me the shape in the {position}.",
    ),
    "color": (
        CANONICAL["color"],
        "Tell me the color of the {shape}.",
        "What is the color of the {shape}?",
        "Which color is the {shape}?",
        "Which color does the {shape} have?",
        "What color is the {shape} in the image?",
        "In what color is the {shape} drawn?",
        "Name the color of the {shape}.",
    ),
    "count": (
        CANONICAL["count"],
        "Count the {shape}s.",
        "How many {shape}s are in the image?",
        "How many {shape}s do you see?",
        "How many {shape}s can you see in the picture?",
        "What is the number of {shape}s?",
        "Tell me how many {shape}s there are.",
        "Count the number of {shape}s in the image.",
    ),
    "number": (
        CANONICAL["number"],
        "Read the number.",
        "What number is in the image?",
        "Which number do you see?",
        "What number is shown?",
        "What is the number in the picture?",
        "Which number is written here?",
        "Tell me the number.",
    ),
    "position": (
        CANONICAL["position"],
        "In which part of the image is the {color} {shape}?",
        "Where in the image is the {color} {shape}?",
        "Where can you see the {color} {shape}?",
        "What is the position of the {color} {shape}?",
        "Where is the {color} {shape} located?",
        "Tell me where the {color} {shape} is.",
        "Find the {color} {shape}. Where is it?",
    ),
    "caption": (
        CANONICAL["caption"],
        "What is in the image?",
        "Describe the picture.",
        "What do you see?",
        "Describe what you see in the image.",
        "Give a short description of the image.",
        "What does the picture show?",
        "Caption this image.",
    ),
    "box": (
        CANONICAL["box"],
        "Give the bounding box of <ref>{ref}</ref>.",
        "Where is <ref>{ref}</ref>? Answer with a bounding box.",
        "Locate <ref>{ref}</ref>.",
        "Detect <ref>{ref}</ref> and give its box.",
    ),
}


@dataclass(frozen=True)
class Item:
    """One thing on a plate. `box` is its tight extent (x1, y1, x2, y2) in pixels, floats, y downwards.

    The fields from `fill` on are the drawing's details; without them the item is drawn upright in the plain shade.
    """

    kind: str  # one of SHAPES, or 'number'
    color: str  # one of COLORS
    box: Box
    text: str = ""  # a number's digits
    fill: RGB | None = None
    points: Points = ()  # a polygon's corners in pixels (none for circles)
    font: str = ""  # a font file; '' is Pillow's own
    font_size: int = 0

    @property
    def center(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True)
class Plate:
    """A picture's layout: width and height in pixels, a plain background and the items on it."""

    width: int
    height: int
    background: RGB
    items: tuple[Item, ...]

    @property
    def shapes(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.kind != "number")

    @property
    def number(self) -> Item | None:
        return next((item for item in self.items if item.kind == "number"), None)


@dataclass(frozen=True)
class QA:
    """A question about one picture, its answer, and the category it is scored in (one of CATEGORIES)."""

    category: str
    question: str
    answer: str


# ---------------------------------------------------------------------------------------------------------------------
# Colours: a name covers a generous region, and regions of two names keep a gap
# ---------------------------------------------------------------------------------------------------------------------

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


def _shade(rng: random.Random, name: str) -> RGB:
    draw = rng.random()
    if draw < 0.2:
        return PLAIN_SHADES[name]
    if draw < 0.65:
        return _jitter(rng, rng.choice(_SHADES[name]), rng.choice((0, 0, 8)))
    (h0, h1), (s0, s1), (v0, v1) = _REGIONS[name]
    r, g, b = colorsys.hsv_to_rgb(rng.uniform(h0, h1) % 360 / 360, rng.uniform(s0, s1), rng.uniform(v0, v1))
    return round(r * 255), round(g * 255), round(b * 255)


def _background(rng: random.Random) -> RGB:
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


def _contrasts(color: RGB, name: str, background: RGB) -> bool:
    """True where a person sees the item at once and would still give it this name."""
    if name == "black":
        return _luminance(background) > 130
    differences = [abs(a - b) for a, b in zip(color, background, strict=True)]
    return max(differences) >= 95 and sum(differences) >= 120


def _contrasting_shade(rng: random.Random, background: RGB, names: Sequence[str]) -> tuple[str, RGB]:
    while True:
        name = rng.choice(names)
        for _ in range(6):
            shade = _shade(rng, name)
            if _contrasts(shade, name, background):
                return name, shade


# ---------------------------------------------------------------------------------------------------------------------
# Fonts
# ---------------------------------------------------------------------------------------------------------------------

# File-name beginnings, lower case, without '-' and '_': fonts that only the evaluation draws with.
HELD_OUT_FONTS = ("dejavuserif", "stix", "cmb10", "cmex10", "cmmi10", "cmr10", "cmss10", "cmsy10", "cmti10", "cmtt10")
# Digits of the first are pictures, bars or boxes; hairlines vanish in a small picture.
_SYMBOL_FONTS = ("wingding", "webding", "symbol", "marlett", "emoji", "awesome", "icon", "barcode", "dingbat")
_HAIRLINE_FONTS = ("thin", "hairline", "extralight", "ultralight")


def _font_folders() -> list[Path]:
    home = Path.home()
    if sys.platform == "win32":
        folders = [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
    elif sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    else:
        folders = [
            Path("/usr/share/fonts"),
            Path("/usr/local/share/fonts"),
            home / ".local/share/fonts",
            home / ".fonts",
        ]
    # Packages are only located: importing matplotlib would cost half a second.
    spec = find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf")
    # Font packages of PyPI (font-roboto, font-source-serif-pro, ...) announce their files under these names.
    for group in ("fonts_ttf", "fonts_otf"):
        for point in entry_points(group=group):
            spec = find_spec(point.module)
            if spec is not None and spec.origin is not None:
                folders.append(Path(spec.origin).parent)
    return folders


@lru_cache(maxsize=2048)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    if not path:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _ink(text: str, path: str, size: int, antialias: bool = True) -> Image.Image:
    """The text's mask (mode L), cropped to its ink."""
    font = _font(path, size)
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (int(right - left) + size // 2 + 4, int(bottom - top) + 4))
    draw = ImageDraw.Draw(mask)
    draw.fontmode = "L" if antialias else "1"
    draw.text((2 - left, 2 - top), text, fill=255, font=font)
    box = mask.getbbox()
    return mask.crop(box) if box else mask


def _has_digits(path: str) -> bool:
    """Whether the font draws ten different digits (symbol and other-script fonts draw boxes or nothing)."""
    try:
        glyphs = {bytes(_ink(digit, path, 24).tobytes()) for digit in "0123456789"}
    except (OSError, ValueError):
        return False
    return len(glyphs) == 10


@lru_cache(maxsize=8)
def training_fonts(extra_folders: tuple[str, ...] = ()) -> tuple[tuple[str, ...], ...]:
    """Font files to draw numbers with, grouped by family; the family ('',) is Pillow's own font.

    Looks in the system's font folders, in matplotlib and PyPI's font packages where installed, and in
    `extra_folders`. A file name counts once. Held-out fonts and fonts without digits are left out. Sorted by file name,
    so that a seed draws the same picture wherever the same fonts are installed.
    """
    files: dict[str, Path] = {}
    for folder in [*_font_folders(), *map(Path, extra_folders)]:
        if folder.is_dir():
            for path in sorted(folder.rglob("*.[to]tf")):
                files.setdefault(path.stem.lower().replace("-", "").replace("_", ""), path)
    families: dict[str, list[str]] = {}
    for key in sorted(files):
        if key.startswith(HELD_OUT_FONTS) or any(word in key for word in (*_SYMBOL_FONTS, *_HAIRLINE_FONTS)):
            continue
        if _has_digits(str(files[key])):
            family = files[key].stem.split("-")[0].lower()
            families.setdefault(family, []).append(str(files[key]))
    return ("",), *(tuple(paths) for paths in families.values())


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
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


# Around the middle a position has no name that everyone would give: the gap between the two margins is left unasked.
CENTER_MARGIN = 0.12
CORNER_MARGIN = 0.14


def position_of(item: Item, plate: Plate) -> str | None:
    """The item's place by name (one of POSITIONS), or None where people would differ.

    With the item's centre as a share of width and height: 'center' within CENTER_MARGIN of the middle on both axes, a
    corner's name beyond CORNER_MARGIN on both.
    """
    x, y = item.center
    dx, dy = x / plate.width - 0.5, y / plate.height - 0.5
    if abs(dx) <= CENTER_MARGIN and abs(dy) <= CENTER_MARGIN:
        return "center"
    if abs(dx) < CORNER_MARGIN or abs(dy) < CORNER_MARGIN:
        return None
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


# ---------------------------------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------------------------------

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
    background = _background(rng)
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
        name, fill = _contrasting_shade(rng, background, COLORS)
        if one_color is not None and index != number_index:
            for _ in range(8):
                shade = _shade(rng, one_color)
                if _contrasts(shade, one_color, background):
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
    background = _background(rng)
    columns, rows = rng.choice((1, 2, 2, 3, 3, 4)), rng.choice((1, 2, 2, 3, 3, 4))
    cell = width // columns, height // rows
    gap = max(2.0, 0.015 * min(cell))
    items: list[Item] = []
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.1:
                continue
            name, fill = _contrasting_shade(rng, background, COLORS)
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
        ink_w, ink_h = _ink(text, path, int(size)).size
        ink_w = max(2, round(ink_w * stretch))
        box = _free_spot(rng, items, width, height, gap, (ink_w, ink_h), slot)
        if box is not None:
            x, y = int(box[0]), int(box[1])  # glyphs are drawn on the pixel grid
            return Item("number", name, (x, y, x + ink_w, y + ink_h), text, fill, (), path, int(size))
        size = max(10, size * 0.8)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


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
    mask = _ink(item.text, item.font, item.font_size or max(8, round(extent[1] / 0.73)), antialias)
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


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------


def _ask(rng: random.Random, key: str, **words: str) -> str:
    """One wording: the canonical one in CANONICAL_SHARE of cases, else a paraphrase, sometimes carelessly typed."""
    phrases = _PHRASES[key]
    if rng.random() < CANONICAL_SHARE:
        return phrases[0].format(**words)
    question = rng.choice(phrases[1:]).format(**words)
    if rng.random() < 0.25:
        question = question.replace("color", "colour")
    if key != "box":
        if rng.random() < 0.2:
            question = question.lower()
        if rng.random() < 0.2:
            question = question.rstrip("?.")
    return question


def caption_of(items: Sequence[Item]) -> str:
    """The one caption of these items, whatever their places: colours in COLORS' order, then shapes in SHAPES'.

    `a red circle`, `two blue stars and a green square`, `a red circle, a green star and the number 42`.
    """
    counts = Counter((item.color, item.kind) for item in items if item.kind != "number")
    parts = []
    for color in COLORS:
        for shape in SHAPES:
            count = counts[color, shape]
            if count == 1:
                parts.append(f"{'an' if color == 'orange' else 'a'} {color} {shape}")
            elif count:
                parts.append(f"{COUNT_WORDS[count]} {color} {shape}s")
    parts += [f"the number {item.text}" for item in items if item.kind == "number"]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def box_in_thousandths(item: Item, plate: Plate) -> tuple[int, int, int, int]:
    """The item's box in the grounding convention: integers 0..1000, shares of the whole picture's width and height."""
    x1, y1, x2, y2 = item.box
    values = (x1 / plate.width, y1 / plate.height, x2 / plate.width, y2 / plate.height)
    a, b, c, d = (min(1000, max(0, round(value * 1000))) for value in values)
    return a, b, c, d


def reference_to(item: Item) -> str:
    return "number" if item.kind == "number" else f"{item.color} {item.kind}"


def grounded_answer(item: Item, plate: Plate) -> str:
    """`<ref>red circle</ref><box>[[x1, y1, x2, y2]]</box>`."""
    box = ", ".join(map(str, box_in_thousandths(item, plate)))
    return f"<ref>{reference_to(item)}</ref><box>[[{box}]]</box>"


def questions(plate: Plate, rng: random.Random) -> list[QA]:
    """Questions with one right answer on this plate, several a category, in a fixed order of categories.

    A shape is asked for by kind only where it is the only one of its kind, by colour and kind only where the pair is
    unique, by place only where `position_of` has a name for it and nothing else stands there. Answers are bare lower
    case words, digits for numbers and counts; a box is `<ref>red circle</ref><box>[[x1, y1, x2, y2]]</box>`.
    """
    shapes, number = plate.shapes, plate.number
    kinds = Counter(item.kind for item in shapes)
    colors = Counter(item.color for item in plate.items)
    pairs = Counter((item.color, item.kind) for item in shapes)
    places = Counter(position_of(item, plate) for item in plate.items)
    found: list[QA] = []

    if len(shapes) == 1:
        found.append(QA("shape", _ask(rng, "shape"), shapes[0].kind))
    for item in shapes:
        place = position_of(item, plate)
        if colors[item.color] == 1 and rng.random() < 0.35:
            found.append(QA("shape", _ask(rng, "shape_by_color", color=item.color), item.kind))
        if place is not None and places[place] == 1 and places[None] == 0 and rng.random() < 0.25:
            found.append(QA("shape", _ask(rng, "shape_by_position", position=place), item.kind))

    for item in shapes:
        if kinds[item.kind] == 1:
            found.append(QA("color", _ask(rng, "color", shape=item.kind), item.color))
    if len(plate.items) == 1 and shapes and rng.random() < 0.2:
        found.append(QA("color", _ask(rng, "color", shape="shape"), shapes[0].color))
    if number is not None:
        found.append(QA("color", _ask(rng, "color", shape="number"), number.color))

    for kind in SHAPES:
        # Ones are everywhere: half of them are left out beside other kinds, so that counting is learnt.
        if kinds[kind] > 1 or (kinds[kind] and (len(kinds) == 1 or rng.random() < 0.5)):
            found.append(QA("count", _ask(rng, "count", shape=kind), str(kinds[kind])))
    absent = [kind for kind in SHAPES if not kinds[kind]]
    if absent and rng.random() < 0.25:
        found.append(QA("count", _ask(rng, "count", shape=rng.choice(absent)), "0"))
    if shapes and rng.random() < 0.6:
        found.append(QA("count", _ask(rng, "count", shape="shape"), str(len(shapes))))
    if shapes and rng.random() < 0.25:
        item = rng.choice(shapes)
        found.append(
            QA("count", _ask(rng, "count", shape=f"{item.color} {item.kind}"), str(pairs[item.color, item.kind]))
        )

    if number is not None:
        found.append(QA("number", _ask(rng, "number"), number.text))

    for item in shapes:
        place = position_of(item, plate)
        if place is None:
            continue
        if pairs[item.color, item.kind] == 1:
            found.append(QA("position", _ask(rng, "position", color=item.color, shape=item.kind), place))
        if kinds[item.kind] == 1 and rng.random() < 0.3:
            question = _ask(rng, "position", color="", shape=item.kind).replace("the  ", "the ")
            found.append(QA("position", question, place))
    if number is not None:
        place = position_of(number, plate)
        if place is not None:
            question = _ask(rng, "position", color="", shape="number").replace("the  ", "the ")
            found.append(QA("position", question, place))

    if plate.items:
        found.append(QA("caption", _ask(rng, "caption"), caption_of(plate.items)))

    for item in plate.items:
        if item.kind != "number" and pairs[item.color, item.kind] > 1:
            continue
        ref = reference_to(item)
        found.append(QA("box", _ask(rng, "box", ref=ref), grounded_answer(item, plate)))
    return found
