"""Fonts that numbers of the plate world are drawn with, and their ink."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


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


def ink(text: str, path: str, size: int, antialias: bool = True) -> Image.Image:
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
        glyphs = {bytes(ink(digit, path, 24).tobytes()) for digit in "0123456789"}
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
