"""Every question about a plate that has one unambiguous answer, in several wordings."""

from __future__ import annotations

import random
from collections import Counter

from .words import CANONICAL, QA, SHAPES, Plate, caption_of, grounded_answer, position_of, reference_to


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
