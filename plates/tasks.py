"""The plate world as training data, one task for each stage of EViP (paper 2410.08202, 3.3 and table 1).

    text            no pictures: a plate described in words, then questions about it      the dense language model
    noisy_captions  captions with wrong, missing and stray words, of up to 3 shapes       S1.1, concepts
    captions        long, clean captions with places                                       S1.2, semantics
    alignment       captions, boxes, printed numbers, and sheets full of things to read    S1.3
    instructions    every question of the plate world, and conversations without pictures  S2

`PlateWorld(task, length)[i]` is made from `(seed, i)` alone, so any worker draws the same. Plates grow harder with `i`.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..common.record import Record
from ..image_processing_mono_internvl import choose_grid
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import PATCH_SIZE, count_tiles
from .drawing import draw_plate
from .layout import check_size, sample_plate, sample_sheet
from .questions import questions
from .words import COLORS, QA, SHAPES, Item, Plate, caption_of, position_of


TASKS = ("text", "noisy_captions", "captions", "alignment", "instructions")
CAPTION_PROMPT = "provide a one-sentence caption for the image"
LIST_PROMPT = "list everything in the image"
# Questions asked of one plate. Told in words, answers are all that teaches. Of a picture the patches are named as well,
# and a question costs a third of what the picture does.
QUESTIONS = {"text": 4, "alignment": 2, "instructions": 3}
# Share of plates with a printed number.
NUMBERS = {"noisy_captions": 0.25, "captions": 0.4, "alignment": 0.55, "instructions": 0.4}
# Plates of the end of a run: several of a kind to count, and numbers whose digits share a patch.
CLOSING: dict[str, Any] = {
    "with_number": 0.55,
    "number_size": (0.08, 0.35),
    "count_weights": (10, 20, 25, 25, 20),
    "one_kind": 0.65,
}
# Share of sheets among the pictures, as S1.3 of the paper has pages to read.
SHEETS = {"alignment": 0.5, "instructions": 0.15}
# One block of pictures in so many is of several tiles, and costs twice what another does.
TILED_EVERY = 5
# So many plates in a row that do not fit are a mistake in the size, not chance.
DRAWS = 10_000
# How often each category is chosen when it applies.
TEXT = {"shape": 2.0, "color": 2.5, "count": 3.5, "number": 3.0, "position": 3.0, "caption": 1.2}
ALIGNMENT = {"caption": 4.0, "box": 3.0, "number": 8.0, "color": 0.5, "position": 0.5}
INSTRUCTIONS = {**TEXT, "number": 6.0, "caption": 2.5, "box": 1.5}
WEIGHTS = {"alignment": ALIGNMENT, "instructions": INSTRUCTIONS}
TEXT_SHARE = 0.1
GREETINGS = (
    ("Hello", "hello, show me a picture of shapes and ask about them."),
    ("Hi", "hello, show me a picture of shapes and ask about them."),
    ("Who are you?", "i am the mono-internvl nano."),
    ("What is your name?", "i am the mono-internvl nano."),
    ("What can you do?", "i answer questions about plain shapes and numbers in a picture."),
    ("Which shapes do you know?", "circle, square, triangle and star."),
    ("Which colors do you know?", "red, green, blue, yellow, purple, orange and black."),
)
# Words that stand around the captions of pictures found on the web.
_BEFORE = ("", "", "", "a picture of ", "image of ", "a drawing of ", "a photo of ")
_AFTER = ("", "", "", " on a plain background", " in the image", ", a picture")


class PlateWorld:
    """A source of records (see `training.sources`), in order.

    Args:
        task: one of TASKS.
        length: records; the curriculum goes by `i / length`.
        naming: share of the run in which visual tokens have targets too (`name_patches`).
        questions: most questions asked of one plate (default: QUESTIONS' of the task).
        category_weights: how often each category is chosen when it applies, over the task's own weights.
        closing: from this share of the run on, plates are fuller and numbers smaller (CLOSING).
        odd_one: share of the plates of three shapes and more of one kind in which one is of another (`sample_plate`).
        size: smallest and largest side of a picture in pixels.
        block: of so many neighbours all pictures are cut into several tiles or none is, so that batches are padded
            little; one block in `tiled_every` is.
        tiled_every: 1 or more; 1 makes all pictures of several tiles.
        tile_size, max_tiles: how pictures will be cut.
        seed: another seed, other plates.

    Raises:
        ValueError: an unknown task, fewer than one question, a category that the task does not ask, a weight that is
            not positive, or either of them for a task that asks none; `odd_one` is not in 0..1; `size` is not
            32 <= smallest <= largest; `tiled_every` is less than 1; or, from `[index]`, no picture of this size is cut
            as wanted.
    """

    ordered = True

    def __init__(
        self,
        task: str,
        length: int,
        *,
        naming: float = 0.0,
        questions: int | None = None,
        category_weights: Mapping[str, float] | None = None,
        closing: float = 1.0,
        odd_one: float = 0.0,
        size: Sequence[int] = (96, 320),
        block: int = 64,
        tiled_every: int = TILED_EVERY,
        tile_size: int = 224,
        max_tiles: int = 3,
        seed: int = 0,
    ):
        if task not in TASKS:
            raise ValueError(f"plate_world: unknown task {task!r}; allowed are {', '.join(TASKS)}")
        if task not in WEIGHTS and (questions is not None or category_weights):
            raise ValueError(f"plate_world/{task}: questions and category_weights are of {', '.join(WEIGHTS)} alone")
        self.questions = QUESTIONS.get(task, 0) if questions is None else questions
        if questions is not None and questions < 1:
            raise ValueError(f"plate_world/{task}: questions must be at least 1, not {questions}")
        self.weights = {**WEIGHTS.get(task, {}), **(category_weights or {})}
        for name, weight in self.weights.items():
            if name not in WEIGHTS[task]:
                known = ", ".join(WEIGHTS[task])
                raise ValueError(f"plate_world/{task}: category_weights knows no {name!r}; allowed are {known}")
            if not weight > 0:
                raise ValueError(f"plate_world/{task}: category_weights of {name} must be positive, not {weight}")
        if not 0 <= odd_one <= 1:
            raise ValueError(f"plate_world/{task}: odd_one is a share, 0 to 1, not {odd_one}")
        try:
            check_size(size)
        except ValueError as error:
            raise ValueError(f"plate_world/{task}: {error}") from None
        if tiled_every < 1:
            raise ValueError(f"plate_world/{task}: tiled_every must be at least 1, not {tiled_every}")
        self.task, self.length, self.block, self.seed = task, length, block, seed
        self.size, self.tiled_every = (size[0], size[1]), tiled_every
        self.naming, self.closing, self.odd_one, self.sheets = naming, closing, odd_one, SHEETS.get(task, 0.0)
        self.grid_of = partial(choose_grid, tile_size=tile_size, max_tiles=max_tiles)
        self.name = f"plate_world/{task}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        rng = random.Random(f"{self.seed}/{self.task}/{index}")
        progress = index / self.length
        where = f"{self.name}, {index}"
        if self.task == "text" or (self.task == "instructions" and rng.random() < TEXT_SHARE):
            return Record(_messages(_text_turns(rng)), where)
        tiled = (index // self.block) % self.tiled_every == 0
        if rng.random() < self.sheets:
            plate = self._of_tiles(partial(sample_sheet, rng, size=self.size), tiled)
            turns = [(LIST_PROMPT, listing(plate))]
        else:
            plate = self._plate(rng, progress, tiled)
            turns = self._turns(plate, rng)
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        if progress >= self.naming:
            return Record(_messages(turns, draw_plate(plate, rng)), where)
        finish = partial(name_patches, plate=plate, grid=self.grid_of(plate.width, plate.height))
        return Record(_messages(turns, draw_plate(plate, rng)), where, finish=finish)

    def _plate(self, rng: random.Random, progress: float, tiled: bool) -> Plate:
        most = 5
        if self.task == "noisy_captions":
            most = 1 if progress < 0.3 else 3
        elif self.task == "captions":
            most = 3 if progress < 0.3 else 5
        options: dict[str, Any] = {"max_shapes": most, "size": self.size, "odd_one": self.odd_one}
        options |= CLOSING if progress >= self.closing else {"with_number": NUMBERS[self.task]}
        return self._of_tiles(partial(sample_plate, rng, **options), tiled)

    def _of_tiles(self, draw: Callable[[], Plate], tiled: bool) -> Plate:
        """The first plate drawn that is not empty and is cut into several tiles, or into one."""
        for _ in range(DRAWS):
            plate = draw()
            if plate.items and (self.grid_of(plate.width, plate.height) != (1, 1)) == tiled:
                return plate
        wanted = "several tiles" if tiled else "one tile"
        raise ValueError(f"{self.name}: none of {DRAWS} pictures with sides of {self.size} pixels is cut into {wanted}")

    def _turns(self, plate: Plate, rng: random.Random) -> list[tuple[str, str]]:
        if self.task == "noisy_captions":
            return [(CAPTION_PROMPT, noisy_caption(plate, rng))]
        if self.task == "captions":
            return [(CAPTION_PROMPT, long_caption(plate))]
        asked = choose_questions(questions(plate, rng), rng, self.weights, self.questions)
        return [(qa.question, qa.answer) for qa in asked] or [(CAPTION_PROMPT, long_caption(plate))]


def noisy_caption(plate: Plate, rng: random.Random) -> str:
    """A caption as the web has them: things left out, a colour mistaken, words around it."""
    items = [item for item in plate.items if rng.random() > 0.15] or list(plate.items)
    items = [_recoloured(item, rng) if rng.random() < 0.08 else item for item in items]
    return rng.choice(_BEFORE) + caption_of(items) + rng.choice(_AFTER)


def long_caption(plate: Plate) -> str:
    """Each thing in reading order, with its place where it has a name."""
    parts = []
    for item in sorted(plate.items, key=lambda item: (int(3 * item.center[1] / plate.height), item.center[0])):
        name = f"the number {item.text} in {item.color}" if item.kind == "number" else caption_of([item])
        place = position_of(item, plate)
        parts.append(name if place is None else f"{name} in the {place}")
    return ", ".join(parts)


def listing(plate: Plate) -> str:
    """What stands on a sheet, in reading order: `red 47, blue star`."""
    return ", ".join(f"{item.color} {item.text or item.kind}" for item in plate.items)


def choose_questions(candidates: list[QA], rng: random.Random, weights: dict[str, float], count: int) -> list[QA]:
    """A draw without replacement, by the weight of each question's category."""
    keyed = [
        (rng.random() ** (1.0 / weights[qa.category]), i) for i, qa in enumerate(candidates) if weights.get(qa.category)
    ]
    return [candidates[i] for _, i in sorted(keyed, reverse=True)[:count]]


def name_patches(
    example: dict[str, torch.Tensor], processor: MonoInternVLProcessor, plate: Plate, grid: tuple[int, int]
) -> None:
    """Give the visual tokens of the one picture of a conversation their targets, in place.

    A token sees only what comes before it, so a shape's upper patches are left alone: its name is asked of those whose
    centre lies in the lower 60 % of its box. The target stands one place on, as labels are shifted.

    Args:
        grid: (columns, rows) of the picture's tiles; more than one are followed by the thumbnail.

    Raises:
        ValueError: the conversation's picture is cut in another way.
    """
    side = processor.image_processor.tile_size // PATCH_SIZE
    columns, rows = grid
    first = int((example["input_ids"] == processor.image_token_id).nonzero()[0])
    views = [(first, columns, rows)]
    tiles = count_tiles(columns, rows, use_thumbnail=True)
    given = int((example["input_ids"] == processor.image_token_id).sum())
    if given != tiles * side**2:
        # Targets would land on other patches, or on words.
        raise ValueError(
            f"the picture has {given} visual tokens; in {columns} x {rows} tiles of {side * PATCH_SIZE} pixels it "
            f"would have {tiles * side**2}: give PlateWorld the tile_size and max_tiles that pictures are cut with"
        )
    if tiles > columns * rows:
        views.append((first + columns * rows * side**2, 1, 1))
    for item in plate.items:
        names = list(item.text) if item.kind == "number" else [item.kind]
        left, top, right, bottom = item.box
        lower, width = top + 0.4 * (bottom - top), (right - left) / len(names)
        for i, name in enumerate(names):
            (target,) = processor.tokenizer.encode(name, add_special_tokens=False)
            start = left + i * width
            for first, columns, rows in views:
                across = _patches_between(start / plate.width, (start + width) / plate.width, columns * side)
                for y in _patches_between(lower / plate.height, bottom / plate.height, rows * side):
                    for x in across:
                        tile, place = y // side * columns + x // side, y % side * side + x % side
                        example["labels"][first + tile * side**2 + place + 1] = target


def _patches_between(low: float, high: float, count: int) -> range:
    """Of `count` patches in a row, those whose centre lies between two shares of it; at least the middle one."""
    inside = range(max(math.ceil(low * count - 0.5), 0), min(math.ceil(high * count - 0.5), count))
    middle = min(int((low + high) / 2 * count), count - 1)
    return inside or range(middle, middle + 1)


def _text_turns(rng: random.Random) -> list[tuple[str, str]]:
    """A conversation without a picture: small talk, or a plate told in words and questions about it."""
    if rng.random() < 0.1:
        return [rng.choice(GREETINGS)]
    while True:
        plate = sample_plate(rng, max_shapes=5, with_number=0.4)
        asked = choose_questions(questions(plate, rng), rng, TEXT, QUESTIONS["text"])
        if asked:
            break
    told = long_caption(plate)
    (first, answer), *others = [(qa.question, qa.answer) for qa in asked]
    return [(f"The image shows {told}. {first}", answer), *others]


def _messages(turns: list[tuple[str, str]], picture: Any = None) -> list[dict[str, Any]]:
    pictures = [] if picture is None else [picture]
    return MonoInternVLProcessor.conversation(turns, pictures)


def _recoloured(item: Item, rng: random.Random) -> Item:
    kind = item.kind if rng.random() < 0.5 or item.kind == "number" else rng.choice(SHAPES)
    return Item(kind, rng.choice(COLORS), item.box, item.text)
