"""What the model sees of a picture, tile by tile and patch by patch, and what it costs in tokens: counted and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from ..image_processing_mono_internvl import PATCH_SIZE, MonoInternVLImageProcessor, unpatchify
from .drawing import font


MAX_WIDTH, MAX_HEIGHT, MARGIN, GAP = 1600, 1600, 24, 20
_SMALLEST_THUMBNAIL, _LABEL = 150, 26
_PAPER, _INK, _SOFT, _LINE = "#ffffff", "#1f2933", "#616e7c", "#00b4d8"


@dataclass(frozen=True)
class Tiling:
    """How a picture of width x height px is cut; `tiles` counts the thumbnail."""

    width: int
    height: int
    tile_size: int
    cols: int
    rows: int
    tiles: int

    @property
    def patches(self) -> int:
        """Along the side of a tile."""
        return self.tile_size // PATCH_SIZE

    @property
    def visual_tokens(self) -> int:
        return self.tiles * self.patches**2

    @property
    def has_thumbnail(self) -> bool:
        return self.tiles > self.cols * self.rows


def cut(
    image: Image.Image, processor: MonoInternVLImageProcessor, **tile_range: Any
) -> tuple[Tiling, list[Image.Image]]:
    """The tiling of an RGB picture and its tiles, thumbnail last, put together again from the model's own input.

    `tile_range`: min_tiles and max_tiles of this call, as the image processor takes them.
    """
    patches = processor(image, do_normalize=False, return_tensors="pt", **tile_range)["pixel_values"]
    side = processor.tile_size
    cols, rows = processor.grid_of(*image.size, **tile_range)
    arrays = unpatchify(patches).permute(0, 2, 3, 1).contiguous().numpy()
    return Tiling(*image.size, side, cols, rows, len(arrays)), [Image.fromarray(array) for array in arrays]


def describe_tiling(tiling: Tiling) -> list[tuple[str, str]]:
    """(label, fact) lines for people: picture, grid, tokens."""
    side, cols, rows = tiling.tile_size, tiling.cols, tiling.rows
    extra = f" + thumbnail = {tiling.tiles} tiles" if tiling.has_thumbnail else ""
    return [
        ("picture", f"{tiling.width} x {tiling.height} px, resized to {cols * side} x {rows * side} px"),
        ("grid", f"{cols} x {rows} tiles of {side} px{extra}" if cols * rows > 1 else f"1 tile of {side} px"),
        ("tokens", f"{tiling.visual_tokens:,} visual tokens = {tiling.tiles} x ({side}/{PATCH_SIZE})^2"),
    ]


# ------------------------------------------------------------------------------------------------------------- drawing


def draw_tiling(name: str, tiling: Tiling, seen: list[Image.Image]) -> Image.Image:
    """One picture: caption, the resized picture with its tiles and patches, and the thumbnail."""
    scale, thumbnail_side, below = _layout(tiling)
    tile = max(1, round(tiling.tile_size * scale))
    grid_size = (tiling.cols * tile, tiling.rows * tile)
    content = list(grid_size)
    if tiling.has_thumbnail and below:
        content = [max(grid_size[0], thumbnail_side), grid_size[1] + GAP + thumbnail_side + _LABEL]
    elif tiling.has_thumbnail:
        content = [grid_size[0] + GAP + thumbnail_side, max(grid_size[1], thumbnail_side + _LABEL)]
    width = min(MAX_WIDTH, max(content[0] + 2 * MARGIN, 480))

    title, body = font(24, name), font(17)
    lines = [(name, title, _INK)]
    for _, fact in describe_tiling(tiling):
        lines += [(line, body, _SOFT) for line in _wrap(fact, body, width - 2 * MARGIN)]
    heights = [34 if letters is title else 25 for _, letters, _ in lines]
    top = MARGIN + sum(heights) + 14

    sheet = Image.new("RGB", (width, top + content[1] + MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for (text, letters, color), height in zip(lines, heights, strict=True):
        pen.text((MARGIN, y), _shorten(text, letters, width - 2 * MARGIN), font=letters, fill=color)
        y += height

    for index in range(tiling.cols * tiling.rows):
        corner = (MARGIN + index % tiling.cols * tile, top + index // tiling.cols * tile)
        sheet.paste(seen[index].resize((tile, tile), Image.Resampling.LANCZOS), corner)
    _draw_lines(sheet, (MARGIN, top), tile, tiling.cols, tiling.rows, tiling.patches)
    for index in range(tiling.cols * tiling.rows):
        corner = (MARGIN + index % tiling.cols * tile, top + index // tiling.cols * tile)
        _number(sheet, str(index + 1), corner, tile)
    if tiling.has_thumbnail:
        corner = (MARGIN, top + grid_size[1] + GAP) if below else (MARGIN + grid_size[0] + GAP, top)
        small = seen[-1].resize((thumbnail_side, thumbnail_side), Image.Resampling.LANCZOS)
        sheet.paste(small, corner)
        _draw_lines(sheet, corner, thumbnail_side, 1, 1, tiling.patches)
        _number(sheet, str(tiling.tiles), corner, thumbnail_side)
        pen.text((corner[0], corner[1] + thumbnail_side + 7), "thumbnail", font=body, fill=_SOFT)
    return sheet


def _layout(tiling: Tiling) -> tuple[float, int, bool]:
    """Scale of the resized picture, side of the thumbnail in the drawing, and whether it goes below the grid."""
    side, cols, rows = tiling.tile_size, tiling.cols, tiling.rows
    room = MAX_WIDTH - 2 * MARGIN
    largest = max(1.0, 560 / (max(cols, rows) * side))  # small pictures may grow, so that patches can be seen
    if not tiling.has_thumbnail:
        return min(largest, room / (cols * side), MAX_HEIGHT / (rows * side)), 0, False
    below = cols > 3 * rows
    across, down = (cols, rows + 1) if below else (cols + 1, rows)
    scale = min(largest, (room - GAP) / (across * side), MAX_HEIGHT / (down * side))
    thumbnail = round(side * scale)
    if thumbnail < _SMALLEST_THUMBNAIL:
        thumbnail = _SMALLEST_THUMBNAIL
        left = room if below else room - GAP - thumbnail
        scale = min(left / (cols * side), MAX_HEIGHT / (rows * side))
    return scale, thumbnail, below


def _draw_lines(sheet: Image.Image, corner: tuple[int, int], tile: int, cols: int, rows: int, patches: int) -> None:
    """Thin lines between patches, thick ones between tiles."""
    width, height = cols * tile, rows * tile
    step = tile / patches
    if step >= 5:
        # Light and dark side by side: one of them shows on any ground.
        thin = Image.new("RGBA", (width, height), (0, 0, 0, 0))
        pen = ImageDraw.Draw(thin)
        strength = 90 if step >= 12 else 55
        for shift, color in ((0, (255, 255, 255, strength)), (1, (0, 0, 0, strength // 2))):
            for k in range(1, cols * patches):
                x = round(k * step) + shift
                pen.line((x, 0, x, height), fill=color)
            for k in range(1, rows * patches):
                y = round(k * step) + shift
                pen.line((0, y, width, y), fill=color)
        sheet.paste(thin, corner, thin)
    thick = 3 if tile >= 100 else 2
    pen = ImageDraw.Draw(sheet)
    x0, y0 = corner
    for reach, ink in ((thick + 2, _INK), (thick, _LINE)):
        before, after = reach // 2, reach - reach // 2 - 1
        for k in range(cols + 1):
            x = x0 + k * tile
            pen.rectangle((x - before, y0 - before, x + after, y0 + height + after), fill=ink)
        for k in range(rows + 1):
            y = y0 + k * tile
            pen.rectangle((x0 - before, y - before, x0 + width + after, y + after), fill=ink)


def _number(sheet: Image.Image, text: str, corner: tuple[int, int], tile: int) -> None:
    """A tile's number on a dark plate in its upper left corner."""
    size = min(26, max(11, tile // 8))
    letters = font(size)
    pen = ImageDraw.Draw(sheet)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=letters)
    pad, shift = max(3, size // 3), 4 if tile >= 100 else 2
    width, height = int(right - left + 2 * pad), int(bottom - top + 2 * pad)
    plate = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(plate).rounded_rectangle(
        (0, 0, width - 1, height - 1), radius=size // 4, fill=(31, 41, 51, 215), outline=(255, 255, 255, 120)
    )
    place = (corner[0] + shift, corner[1] + shift)
    sheet.paste(plate, place, plate)
    pen.text((place[0] + pad - left, place[1] + pad - top), text, font=letters, fill="white")


def _wrap(text: str, letters: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _shorten(text: str, letters: Any, width: int) -> str:
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
