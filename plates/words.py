"""What the plate world is made of: its words, the things on a plate, and what they are called.

The drawing code of training and that of the evaluation share this file and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]
Points = tuple[tuple[float, float], ...]

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
