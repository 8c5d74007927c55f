"""Pictures of the plate world drawn by matplotlib, to judge the nano model on drawing code it was not trained on.

    for image, category, question, answer in evaluation_set(count=500, seed=0): ...

Nothing here is shared with the training generator but the words: the layout works on grid cells, shapes are matplotlib
patches or scatter markers with Agg's anti-aliasing, colours are matplotlib's names, and numbers are set in fonts that
training holds out (DejaVu Serif, STIX, Computer Modern).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .words import CANONICAL, COLORS, POSITIONS, SHAPES, Item, Plate, caption_of, grounded_answer


CATEGORIES = ("shape", "color", "count", "number", "position", "caption")
BOXES = ("box",)
DPI = 100

_SQUARE = ((200, 200), (224, 224), (256, 256), (448, 448), (512, 512))
_LANDSCAPE = ((320, 240), (500, 400), (640, 480), (640, 360), (600, 300), (600, 240))
_PORTRAIT = ((300, 400), (336, 448), (360, 540), (260, 520))
_LIGHT = ("white", "white", "white", "whitesmoke", "0.85", "lightgray", "ivory", "aliceblue", "honeydew", "mistyrose")
_DARK = ("black", "black", "0.1", "0.2", "#222831", "#1b1b2f", "#2d2424")
_TAB_COLORS = ("red", "green", "blue", "purple", "orange")
_FONTS = ("DejaVu Serif", "STIXGeneral", "cmr10")
_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "star": "*"}


@dataclass
class _Thing:
    """A shape or number of a scene; x, y and radius in pixels, y upwards as matplotlib has it."""

    kind: str
    color: str
    text: str = ""
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0  # of the circle that the thing has to itself
    box: tuple[float, float, float, float] = (0, 0, 0, 0)  # x1, y1, x2, y2, y downwards, once it is drawn as a patch


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.patches
    except ImportError as error:
        raise ImportError("the evaluation pictures are drawn by matplotlib: pip install mono-internvl[eval]") from error
    return matplotlib


def evaluation_set(
    count: int = 500, seed: int = 0, categories: Sequence[str] = CATEGORIES
) -> Iterator[tuple[Image.Image, str, str, str]]:
    """Yields (picture, category, question, answer), `count` of them, the categories in turn (six, or BOXES).

    Within a category the answers take turns as well (shapes, colours, positions, counts 1 to 5, numbers of 1 to 3
    digits). Pictures are RGB, sides 200 to 640 pixels. The same seed gives the same set with the same matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _matplotlib()
    for index in range(count):
        rng = random.Random(f"plate pictures {seed} {index}")
        category = categories[index % len(categories)]
        yield _example(rng, category, index // len(categories))


def _example(rng: random.Random, category: str, turn: int) -> tuple[Image.Image, str, str, str]:
    width, height = rng.choice(_SQUARE + _LANDSCAPE + _PORTRAIT)
    light = rng.random() < 0.65
    colors = COLORS if light else COLORS[:-1]  # no black on dark
    place = None
    if category == "shape":
        things = [_Thing(SHAPES[turn % len(SHAPES)], rng.choice(colors))]
        question, answer = CANONICAL["shape"], things[0].kind
    elif category == "color":
        color = COLORS[turn % len(COLORS)]
        light = light or color == "black"
        kinds = rng.sample(SHAPES, rng.choice((1, 1, 2, 3)))
        others = [name for name in colors if name != color]
        things = [_Thing(kinds[0], color), *(_Thing(kind, rng.choice(others)) for kind in kinds[1:])]
        question, answer = CANONICAL["color"].format(shape=kinds[0]), color
    elif category == "count":
        number = turn % 5 + 1
        kind = rng.choice(SHAPES)
        rest = [shape for shape in SHAPES if shape != kind]
        things = [_Thing(kind, rng.choice(colors)) for _ in range(number)]
        things += [_Thing(rng.choice(rest), rng.choice(colors)) for _ in range(rng.randint(0, min(2, 5 - number)))]
        question, answer = CANONICAL["count"].format(shape=kind), str(number)
    elif category == "number":
        digits = turn % 3 + 1
        text = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
        things = [_Thing("number", rng.choice(_ink_colors(colors, light)), text)]
        things += [_Thing(rng.choice(SHAPES), rng.choice(colors)) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        question, answer = CANONICAL["number"], text
    elif category == "position":
        place = POSITIONS[turn % len(POSITIONS)]
        pairs = rng.sample([(kind, color) for kind in SHAPES for color in colors], rng.choice((1, 2, 3)))
        things = [_Thing(*pair) for pair in pairs]
        question = CANONICAL["position"].format(shape=pairs[0][0], color=pairs[0][1])
        answer = place
    elif category == "box":
        pairs = rng.sample([(kind, color) for kind in SHAPES for color in colors], turn % 4 + 1)
        things = [_Thing(*pair) for pair in pairs]
        question, answer = CANONICAL["box"].format(ref=f"{pairs[0][1]} {pairs[0][0]}"), ""
    else:
        things = [_Thing(rng.choice(SHAPES), rng.choice(colors)) for _ in range(turn % 3 + 1)]
        if len(things) > 1 and rng.random() < 0.3:  # chance alone rarely draws "two blue stars"
            things[1] = _Thing(things[0].kind, things[0].color)
        if rng.random() < 0.2:
            things.append(_Thing("number", rng.choice(_ink_colors(colors, light)), str(rng.randrange(1000))))
        question = CANONICAL["caption"]
        answer = caption_of([Item(thing.kind, thing.color, (0, 0, 1, 1), thing.text) for thing in things])
    _arrange(rng, things, width, height, place)
    image = _draw(rng, things, width, height, light, boxed=category == "box")
    if category == "box":
        target = Item(things[0].kind, things[0].color, things[0].box)
        answer = grounded_answer(target, Plate(width, height, (0, 0, 0), (target,)))
    return image, category, question, answer


def _ink_colors(colors: Sequence[str], light: bool) -> list[str]:
    """Colours for a number: thin yellow strokes on a light ground cannot be read."""
    return [color for color in colors if not (light and color == "yellow")]


def _arrange(rng: random.Random, things: list[_Thing], width: int, height: int, place: str | None) -> None:
    """Gives every thing a cell of a grid; with `place`, the first thing gets the cell of that name."""
    if place is None and len(things) == 1:
        radius = min(width, height) * rng.uniform(0.12, 0.42)
        things[0].radius = radius
        things[0].x = width / 2 + rng.choice((0, rng.uniform(-1, 1))) * (width / 2 - radius) * 0.8
        things[0].y = height / 2 + rng.choice((0, rng.uniform(-1, 1))) * (height / 2 - radius) * 0.8
        return
    if place == "center":
        columns = rows = 3
    elif place is not None:
        columns = rows = rng.choice((2, 2, 3))
    else:
        options = [(c, r) for c in range(1, 6) for r in range(1, 4) if len(things) <= c * r <= len(things) + 4]
        # The grid whose cells are nearest to squares, out of three at random.
        columns, rows = min(
            rng.sample(options, min(3, len(options))),
            key=lambda grid: abs(math.log(width / grid[0] * grid[1] / height)),
        )
    cells = [(column, row) for row in range(rows) for column in range(columns)]
    rng.shuffle(cells)
    if place is not None:
        target = (1, 1)
        if place != "center":
            target = (0 if "left" in place else columns - 1, 0 if "top" in place else rows - 1)
        cells.remove(target)
        cells.insert(0, target)
    cell_w, cell_h = width / columns, height / rows
    half = min(cell_w, cell_h) / 2
    same = rng.uniform(0.4, 0.9) if rng.random() < 0.4 else None
    for thing, (column, row) in zip(things, cells, strict=False):
        thing.radius = half * (same or rng.uniform(0.4, 0.9))
        # A place keeps near its cell's middle, or its name would be in doubt.
        drift = (half * 0.95 - thing.radius) * (0.5 if place else 1.0)
        thing.x = (column + 0.5) * cell_w + rng.uniform(-1, 1) * drift
        thing.y = height - (row + 0.5) * cell_h + rng.uniform(-1, 1) * drift


def _star(x: float, y: float, radius: float, inner: float, turn: float) -> list[tuple[float, float]]:
    corners = []
    for k in range(10):
        reach = radius * (inner if k % 2 else 1.0)
        angle = math.pi / 2 + turn + k * math.pi / 5
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners


def _draw(rng: random.Random, things: list[_Thing], width: int, height: int, light: bool, boxed: bool) -> Image.Image:
    mpl = _matplotlib()
    patches = mpl.patches
    figure = mpl.figure.Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = mpl.backends.backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    figure.patch.set_facecolor(rng.choice(_LIGHT if light else _DARK))

    # A marker's extent is known to matplotlib's renderer only.
    markers = rng.random() < 0.25 and not boxed
    tab = rng.random() < 0.35
    style: dict[str, Any] = {"linewidth": 0}
    if rng.random() < 0.2:
        style = {"linewidth": rng.choice((1.0, 1.5, 2.0)), "edgecolor": "black" if light else "white"}
    elif rng.random() < 0.15:
        style["antialiased"] = False
    inner = rng.choice((0.382, 0.382, 0.45, 0.5))

    for thing in things:
        color = f"tab:{thing.color}" if tab and thing.color in _TAB_COLORS else thing.color
        x, y, radius = thing.x, thing.y, thing.radius
        if thing.kind == "number":
            _write(rng, axes, canvas, thing, color)
            continue
        if markers:
            points = 2 * radius * 72 / DPI * (0.75 if thing.kind == "square" else 1.0)
            axes.scatter([x], [y], s=points**2, marker=_MARKERS[thing.kind], color=color, **style)
            continue
        turn = rng.uniform(-0.3, 0.3) if rng.random() < 0.15 else 0.0
        if thing.kind == "circle":
            patch = patches.Circle((x, y), radius * 0.95, facecolor=color, **style)
        elif thing.kind == "square":
            side = radius * 1.4
            corner = (x - side / 2, y - side / 2)
            patch = patches.Rectangle(
                corner, side, side, angle=math.degrees(turn), rotation_point="center", facecolor=color, **style
            )
        elif thing.kind == "triangle":
            patch = patches.RegularPolygon((x, y), 3, radius=radius * 0.95, orientation=turn, facecolor=color, **style)
        else:
            patch = patches.Polygon(_star(x, y, radius * 0.95, inner, turn), closed=True, facecolor=color, **style)
        axes.add_patch(patch)
        extent = patch.get_path().get_extents(patch.get_transform())
        thing.box = extent.x0, height - extent.y1, extent.x1, height - extent.y0
    canvas.draw()
    columns, rows = canvas.get_width_height()
    return Image.frombytes("RGBA", (columns, rows), bytes(canvas.buffer_rgba())).convert("RGB")


def _write(rng: random.Random, axes: Any, canvas: Any, thing: _Thing, color: str) -> None:
    """Writes the number as large as its circle allows."""
    font = rng.choice(_FONTS)
    weight = "bold" if font != "cmr10" and rng.random() < 0.4 else "normal"
    slant = "italic" if font != "cmr10" and rng.random() < 0.15 else "normal"
    label = axes.text(
        thing.x,
        thing.y,
        thing.text,
        fontsize=40,
        family=font,
        weight=weight,
        style=slant,
        color=color,
        ha="center",
        va="center",
    )
    extent = label.get_window_extent(canvas.get_renderer())
    label.set_fontsize(40 * 2 * thing.radius / math.hypot(extent.width, extent.height))
