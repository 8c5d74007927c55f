"""Which answers are right: exact words; of the plate world captions as multisets, boxes by overlap."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ..plates.words import COLORS, COUNT_WORDS, SHAPES


BOX_IOU_THRESHOLD = 0.5


_COUNTS = {word: count for count, word in COUNT_WORDS.items()} | {"an": 1, "one": 1}
_COUNTS |= {str(count): count for count in COUNT_WORDS}
_PART = re.compile(rf"({'|'.join(_COUNTS)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s?|the number (\d+)")
_BOX = re.compile(r"\[\[?\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]?\]")


def normalize_answer(text: str) -> str:
    """Lower case, without surrounding or repeated white space and without one final period."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def parse_caption(text: str) -> Counter[str] | None:
    """What a caption names, as a multiset of 'red circle' and 'number 42'; None if it holds anything else."""
    found: Counter[str] = Counter()
    for part in re.split(r", and |, | and ", normalize_answer(text)):
        match = _PART.fullmatch(part)
        if match is None:
            return None
        count, color, shape, digits = match.groups()
        if digits is not None:
            found[f"number {digits}"] += 1
        else:
            found[f"{color} {shape}"] += _COUNTS[count]
    return found


def parse_box(text: str) -> tuple[int, int, int, int] | None:
    """The first `[[x1, y1, x2, y2]]` of an answer, or None."""
    match = _BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = map(int, match.groups())
    return x1, y1, x2, y2


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same unit; 0 for empty or inverted boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return shared / (areas - shared)


def answer_iou(expected: str, given: str) -> float:
    """IoU of the first boxes of two answers; 0 where the given one has none.

    Raises:
        ValueError: the expected answer holds no box.
    """
    target, answer = parse_box(expected), parse_box(given)
    if target is None:
        raise ValueError(f"the expected answer holds no [[x1, y1, x2, y2]]: {expected!r}")
    return 0.0 if answer is None else box_iou(target, answer)


def is_correct(category: str, expected: str, given: str) -> bool:
    """Whether an answer counts: captions by what they name, boxes by IoU >= 0.5, all others word for word.

    Raises:
        ValueError: the expected caption or box cannot be read, which is the data's fault, not the model's.
    """
    if category == "caption":
        wanted = parse_caption(expected)
        if wanted is None:
            raise ValueError(f"the expected caption is not in the plate world's words: {expected!r}")
        return parse_caption(given) == wanted
    if category == "box":
        return answer_iou(expected, given) >= BOX_IOU_THRESHOLD
    return normalize_answer(given) == normalize_answer(expected)
