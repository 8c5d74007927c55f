"""Pictures of one number each, in all of which something is held fixed: what does reading numbers hang on?

    python -m mono_internvl.plates.number_pictures OUT --digits 1,2,3 --widths 12,16,20,24,28,36
    mono-internvl evaluate --data OUT/numbers.jsonl

A square picture, a plain ground, one number in a contrasting colour. Every digit has a cell of the same width, so the
first cell's left edge and the width say where every digit stands among the patches. Records carry the category by
which `evaluate` counts, such as `3 digits, 16 px, at 7`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from PIL import Image, ImageDraw, ImageFont

from ..common.files import written_whole
from ..tiling_mono_internvl import PATCH_SIZE
from .colors import contrasting_shade, random_background
from .fonts import training_fonts
from .words import CANONICAL, COLORS, RGB


FONTS = ("held-out", "training")
# The evaluation's, as matplotlib ships them.
_HELD_OUT = ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmr10.ttf")
# Digits are drawn so large and then made smaller: any width can be had, and edges are smooth.
_DRAWN = 160
_MARGIN = 2


class Study(NamedTuple):
    """What is held fixed.

    `width`: of a digit's cell in pixels; `offset`: of the first cell's left edge from the patch edge to its left, in a
    picture that is not scaled, or None for any; `side`: of the picture.
    """

    digits: int
    width: int
    offset: int | None = None
    side: int = 224

    @property
    def category(self) -> str:
        place = "" if self.offset is None else f", at {self.offset}"
        return f"{self.digits} digit{'s' * (self.digits > 1)}, {self.width} px{place}"


def number_mask(text: str, font: str, width: int) -> Image.Image:
    """The number's ink, mode L, [height, width * digits]: cells of one width, as high as the font has it.

    Raises:
        ValueError: the font's digits differ in width, so that cells would not hold them.
    """
    drawn = ImageFont.load_default(_DRAWN) if not font else ImageFont.truetype(font, _DRAWN)
    advances = {drawn.getlength(digit) for digit in "0123456789"}
    if max(advances) - min(advances) > 0.02 * _DRAWN:
        raise ValueError(f"{font}: digits are not of one width")
    advance = round(max(advances))
    mask = Image.new("L", (advance * len(text), 2 * _DRAWN))
    draw = ImageDraw.Draw(mask)
    for place, digit in enumerate(text):
        draw.text((place * advance, _DRAWN // 2), digit, fill=255, font=drawn)
    _, top, _, bottom = mask.getbbox() or (0, 0, 0, mask.height)
    height = max(1, round((bottom - top) * width / advance))
    return mask.crop((0, top, mask.width, bottom)).resize((width * len(text), height), Image.Resampling.BOX)


def draw_number(rng: random.Random, study: Study, fonts: Sequence[str]) -> tuple[Image.Image, str]:
    """A picture, RGB, `side` pixels square, and the number on it; place, colours, font and digits are drawn by `rng`.

    Raises:
        ValueError: the number is wider or higher than the picture, or nowhere has this offset.
    """
    low = 10 ** (study.digits - 1) if study.digits > 1 else 0
    text = str(rng.randrange(low, 10**study.digits))
    background = random_background(rng)
    _, ink = contrasting_shade(rng, background, COLORS)
    mask = number_mask(text, rng.choice(fonts), study.width)
    room = study.side - mask.width - _MARGIN, study.side - mask.height - _MARGIN
    lefts = [x for x in range(_MARGIN, room[0] + 1) if study.offset is None or x % PATCH_SIZE == study.offset]
    if not lefts or room[1] < _MARGIN:
        raise ValueError(f"{study.category}: no room for it in {study.side} px")
    return _pasted(study.side, background, ink, mask, (rng.choice(lefts), rng.randint(_MARGIN, room[1]))), text


def _pasted(side: int, background: RGB, ink: RGB, mask: Image.Image, place: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (side, side), background)
    image.paste(ink, place, mask)
    return image


def font_files(kind: str) -> list[str]:
    """Font files whose digits are of one width: those of the evaluation or those of training, as installed here.

    Raises:
        ValueError: not one of FONTS. ImportError: matplotlib, which brings the evaluation's, is not installed.
    """
    if kind not in FONTS:
        raise ValueError(f"fonts: {kind!r} is not one of {', '.join(FONTS)}")
    if kind == "held-out":
        try:
            from matplotlib import get_data_path
        except ImportError as error:
            raise ImportError("matplotlib brings the held-out fonts: pip install mono-internvl[eval]") from error
        return [str(Path(get_data_path()) / "fonts" / "ttf" / name) for name in _HELD_OUT]
    found = []
    for path in (path for family in training_fonts() for path in family):
        try:
            number_mask("0", path, PATCH_SIZE)
        except ValueError:
            continue
        found.append(path)
    return found


def write_pictures(
    out: Path, studies: Sequence[Study], each: int, fonts: Sequence[str], *, enlarge: int = 1, seed: int = 0
) -> int:
    """Draw `each` pictures of every study into `out`, and write `out/numbers.jsonl`; returns the number of records.

    With `enlarge` the finished pictures are so many times as large: the same to see, over more tiles.
    """
    (out / "pictures").mkdir(parents=True, exist_ok=True)

    def lines() -> Iterator[str]:
        for study in studies:
            for index in range(each):
                rng = random.Random(f"number pictures {seed} {study} {index}")
                image, text = draw_number(rng, study, fonts)
                words = study.category.replace(",", "").replace(" ", "-")
                name = f"pictures/{words}-{study.side}-{index}.png"
                image.resize((study.side * enlarge, study.side * enlarge), Image.Resampling.BICUBIC).save(out / name)
                asked = [{"from": "human", "value": CANONICAL["number"]}, {"from": "gpt", "value": text}]
                yield json.dumps({"id": name, "image": name, "category": study.category, "conversations": asked})

    written = list(lines())
    with written_whole(out / "numbers.jsonl") as temporary:
        temporary.write_text("\n".join(written) + "\n", encoding="utf-8")
    return len(written)


def _numbers(text: str, name: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"{name}: different whole numbers with commas between them are wanted, not {text!r}")
    return found


def main(
    out: Annotated[Path, typer.Argument(help="folder for pictures/ and numbers.jsonl")],
    digits: Annotated[str, typer.Option(help="how many, with commas")] = "1,2,3",
    widths: Annotated[str, typer.Option(help="of a digit in pixels, with commas")] = "12,16,20,24,28,36",
    offsets: Annotated[str, typer.Option(help="of the first digit from a patch edge, with commas; empty: any")] = "",
    side: Annotated[int, typer.Option(min=32, help="of the picture in pixels")] = 224,
    each: Annotated[int, typer.Option(min=1, help="pictures of each digits, width and offset")] = 100,
    enlarge: Annotated[int, typer.Option(min=1, help="finished pictures, so many times")] = 1,
    fonts: Annotated[str, typer.Option(help=", ".join(FONTS))] = "held-out",
    seed: Annotated[int, typer.Option(help="another seed, other pictures")] = 0,
) -> None:
    """Draw pictures of numbers to measure what reading them hangs on."""
    try:
        places = _numbers(offsets, "offsets") if offsets else [None]
        studies = [
            Study(count, width, place, side)
            for count in _numbers(digits, "digits")
            for width in _numbers(widths, "widths")
            for place in places
        ]
        count = write_pictures(out, studies, each, font_files(fonts), enlarge=enlarge, seed=seed)
        typer.echo(f"{count} records: {out / 'numbers.jsonl'}")
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
