"""Drawing on pictures: a font that is always there, labelled boxes."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from ..processing_mono_internvl import GroundedBox


_BOX_COLORS = ("#ff4d4f", "#36cfc9", "#ffc53d", "#9254de", "#73d13d", "#4096ff")


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; for text outside Latin-1 a system font that has it, if one is found."""
    if any(ord(character) > 0xFF for character in text):
        for name in ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc", "DejaVuSans.ttf"):
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):
        # A Pillow built without FreeType: a small bitmap font.
        return ImageFont.load_default()


def draw_boxes(picture: Image.Image, boxes: list[GroundedBox]) -> Image.Image:
    """A copy of an RGB picture with labelled boxes; line and letters follow its size."""
    drawn = picture.copy()
    canvas = ImageDraw.Draw(drawn)
    width, height = picture.size
    line = max(2, round(min(width, height) / 160))
    size = max(12, min(48, round(min(width, height) / 22)))
    pad = max(2, size // 4)
    for i, (label, box) in enumerate(boxes):
        color = _BOX_COLORS[i % len(_BOX_COLORS)]
        x1, x2 = sorted(min(max(x, 0), width - 1) for x in (box[0], box[2]))
        y1, y2 = sorted(min(max(y, 0), height - 1) for y in (box[1], box[3]))
        canvas.rectangle((x1, y1, x2, y2), outline=color, width=line)
        if not label:
            continue
        letters = font(size, label)
        left, top, right, bottom = canvas.textbbox((0, 0), label, font=letters)
        tag_width, tag_height = right - left + 2 * pad, bottom - top + 2 * pad
        # Above the box, or inside it where there is no room above; never outside the picture.
        x = max(0, min(x1, width - tag_width))
        y = y1 - tag_height if y1 >= tag_height else min(y1, max(0, height - tag_height))
        canvas.rectangle((x, y, x + tag_width, y + tag_height), fill=color)
        canvas.text((x + pad - left, y + pad - top), label, font=letters, fill="black")
    return drawn
