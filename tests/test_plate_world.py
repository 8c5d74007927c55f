"""The plate world: layouts, drawing, questions, the evaluation's own pictures, and scoring."""

from __future__ import annotations

import colorsys
import random
import sys
import time
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageChops, ImageFont
from typer.testing import CliRunner

from mono_internvl.common.record import picture_sizes
from mono_internvl.evaluation.answers import Outcome
from mono_internvl.evaluation.plates import PlateResults
from mono_internvl.evaluation.scoring import box_iou, is_correct, parse_box, parse_caption
from mono_internvl.plates import evaluation_pictures, number_pictures
from mono_internvl.plates.drawing import draw_plate
from mono_internvl.plates.fonts import HELD_OUT_FONTS, training_fonts
from mono_internvl.plates.layout import sample_plate, sample_sheet
from mono_internvl.plates.number_pictures import Study, draw_number, font_files, write_pictures
from mono_internvl.plates.questions import questions
from mono_internvl.plates.tasks import listing
from mono_internvl.plates.words import (
    CANONICAL,
    CATEGORIES,
    COLORS,
    POSITIONS,
    SHAPES,
    Item,
    Plate,
    caption_of,
    position_of,
)
from mono_internvl.training.sources import FileRecords


@pytest.fixture(scope="module")
def plates() -> list[Plate]:
    rng = random.Random(0)
    return [sample_plate(rng, with_number=0.4) for _ in range(400)]


@pytest.fixture(scope="module")
def sheets() -> list[Plate]:
    rng = random.Random(5)
    return [sample_sheet(rng) for _ in range(60)]


def centroid(item: Item) -> tuple[int, int]:
    if not item.points:
        x, y = item.center
    else:
        x = sum(x for x, _ in item.points) / len(item.points)
        y = sum(y for _, y in item.points) / len(item.points)
    return int(x), int(y)


def name_of(color: tuple[int, int, int]) -> str:
    """The colour's name by hue, judged apart from the generator's tables."""
    hue, _, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    if value < 0.2:
        return "black"
    limits = [(12, "red"), (43, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (325, "purple"), (361, "red")]
    return next(name for limit, name in limits if hue * 360 < limit)


def test_one_seed_gives_one_picture_and_one_list_of_questions():
    def everything(seed: int) -> tuple[Plate, bytes, list]:
        rng = random.Random(seed)
        plate = sample_plate(rng)
        return plate, draw_plate(plate, rng).tobytes(), questions(plate, rng)

    for seed in range(30):
        assert everything(seed) == everything(seed)
    assert everything(1) != everything(2)


def test_items_lie_inside_the_picture_and_apart(plates, sheets):
    for plate in [*plates, *sheets]:
        assert plate.items
        for item in plate.items:
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= plate.width and 0 <= y1 < y2 <= plate.height
        for first, second in combinations(plate.items, 2):
            a, b = first.box, second.box
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_sizes_counts_and_numbers_cover_the_world(plates):
    assert {len(plate.shapes) for plate in plates} == {0, 1, 2, 3, 4, 5}
    assert {item.kind for plate in plates for item in plate.shapes} == set(SHAPES)
    assert {item.color for plate in plates for item in plate.items} == set(COLORS)
    assert {len(plate.number.text) for plate in plates if plate.number} == {1, 2, 3}
    assert all(96 <= side <= 320 for plate in plates for side in (plate.width, plate.height))
    ratios = [max(plate.width, plate.height) / min(plate.width, plate.height) for plate in plates]
    assert sum(ratio <= 2.01 for ratio in ratios) / len(ratios) > 0.85 and max(ratios) > 2.2
    only_shapes = [sample_plate(random.Random(seed), max_shapes=1, with_number=0) for seed in range(50)]
    assert all(len(plate.items) == 1 and plate.number is None for plate in only_shapes)
    assert all(sample_plate(random.Random(seed), max_shapes=0).number is not None for seed in range(20))


def test_a_plate_can_be_asked_to_be_fuller_and_its_number_smaller():
    usual = [sample_plate(random.Random(i), with_number=0.5) for i in range(200)]
    options = {"number_size": (0.08, 0.35), "count_weights": (0, 0, 0, 1, 1), "one_kind": 1.0}
    full = [sample_plate(random.Random(i), with_number=0.5, **options) for i in range(200)]

    def mean_size(plates):
        sizes = [plate.number.font_size / min(plate.width, plate.height) for plate in plates if plate.number]
        return sum(sizes) / len(sizes), max(sizes)

    assert mean_size(full)[0] < 0.3 < mean_size(usual)[0]
    assert mean_size(full)[1] <= 0.37  # sizes above 48 pixels are rounded to four
    assert all(len({item.kind for item in plate.shapes}) <= 1 for plate in full)
    assert sum(len(p.shapes) for p in full if not p.number) > 1.5 * sum(len(p.shapes) for p in usual if not p.number)


def test_one_shape_of_a_plate_can_be_the_odd_one():
    options = {"with_number": 0, "count_weights": (0, 0, 1, 1, 1), "one_kind": 1.0, "odd_one": 1.0}
    plates = [sample_plate(random.Random(i), **options) for i in range(200)]
    # One that found no room is left out, the odd one too.
    whole = [sorted(Counter(item.kind for item in plate.shapes).values()) for plate in plates if len(plate.shapes) > 2]
    assert {(1, 2), (1, 3), (1, 4)} <= {tuple(kinds) for kinds in whole}
    assert sum(kinds[0] == 1 and len(kinds) == 2 for kinds in whole) > 0.9 * len(whole)


def test_a_sheet_is_full_and_in_reading_order(sheets):
    for sheet in sheets:
        for before, after in pairwise(sheet.items):
            assert after.center[0] > before.center[0] or after.box[1] >= before.box[3]
    numbers = [item for sheet in sheets for item in sheet.items if item.kind == "number"]
    assert max(len(sheet.items) for sheet in sheets) > 9 and sum(len(item.text) for item in numbers) / len(sheets) > 6
    assert (
        listing(Plate(9, 9, (0, 0, 0), (Item("star", "blue", (0, 0, 1, 1)), Item("number", "red", (2, 0, 3, 1), "47"))))
        == "blue star, red 47"
    )


def test_wrong_arguments_name_what_is_allowed():
    with pytest.raises(ValueError, match="max_shapes must be 0 to 5, not 6"):
        sample_plate(random.Random(0), max_shapes=6)
    with pytest.raises(ValueError, match="at least 32"):
        sample_plate(random.Random(0), size=(10, 20))


def test_the_picture_shows_the_named_colors_where_the_items_are(plates, sheets):
    rng = random.Random(1)
    for plate in [*plates[:200], *sheets]:
        image = draw_plate(plate, rng)
        assert image.mode == "RGB" and image.size == (plate.width, plate.height)
        for item in plate.items:
            assert name_of(item.fill) == item.color
            if item.kind == "number":
                continue
            pixel = image.getpixel(centroid(item))
            assert max(abs(a - b) for a, b in zip(pixel, item.fill, strict=True)) < 70, item


def test_boxes_are_tight(plates, sheets):
    rng = random.Random(2)
    for plate in [*plates[:150], *sheets[:20]]:
        for item in plate.items:
            alone = Plate(plate.width, plate.height, plate.background, (item,))
            blank = Image.new("RGB", (plate.width, plate.height), plate.background)
            difference = ImageChops.difference(draw_plate(alone, rng, damage=False), blank)
            difference = ImageChops.lighter(ImageChops.lighter(*difference.split()[:2]), difference.split()[2])
            difference = difference.point(lambda value: 255 * (value > 20))
            ink = difference.getbbox()
            assert ink is not None
            assert all(abs(a - b) <= 2.5 for a, b in zip(ink, item.box, strict=True)), (item, ink)


def test_items_without_drawing_details_are_drawn_plain():
    plate = Plate(
        200,
        100,
        (255, 255, 255),
        (
            Item("star", "red", (10, 10, 60, 60)),
            Item("circle", "blue", (70, 10, 120, 60)),
            Item("number", "green", (130, 20, 190, 60), "42"),
        ),
    )
    image = draw_plate(plate, random.Random(3))
    assert name_of(image.getpixel((35, 37))) == "red"
    assert name_of(image.getpixel((95, 35))) == "blue"
    assert ImageChops.difference(image.crop((130, 20, 190, 60)), Image.new("RGB", (60, 40), "white")).getbbox()


def test_fonts_leave_out_the_held_out_ones(tmp_path):
    data = ImageFont.load_default(24).font_bytes
    held_out = [f"{name}-Own" for name in (*HELD_OUT_FONTS, "DejaVu-Serif", "STIX_Two")]
    for name in (*held_out, "Own-Thin", "OwnEmoji", "Own-Plain", "Own-Bold"):
        (tmp_path / f"{name}.ttf").write_bytes(data)
    (tmp_path / "Own-Damaged.ttf").write_bytes(b"no font")
    families = training_fonts((str(tmp_path),))
    assert families[0] == ("",)
    assert (str(tmp_path / "Own-Bold.ttf"), str(tmp_path / "Own-Plain.ttf")) in families
    paths = [Path(path) for family in families[1:] for path in family]
    assert sum(path.parent == tmp_path for path in paths) == 2
    for path in paths:
        assert not path.name.lower().replace("-", "").replace("_", "").startswith(HELD_OUT_FONTS)


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [
        (0.5, 0.5, "center"),
        (0.42, 0.58, "center"),
        (0.25, 0.25, "top left"),
        (0.15, 0.15, "top left"),
        (0.35, 0.3, "top left"),
        (0.75, 0.2, "top right"),
        (0.3, 0.8, "bottom left"),
        (0.66, 0.66, "bottom right"),
        (0.5, 0.2, None),
        (0.9, 0.5, None),
    ],
)
def test_position_names(x, y, name):
    plate = Plate(300, 200, (255, 255, 255), ())
    assert position_of(Item("circle", "red", (300 * x - 9, 200 * y - 9, 300 * x + 9, 200 * y + 9)), plate) == name


def test_captions_do_not_depend_on_order():
    box = (0.0, 0.0, 1.0, 1.0)
    items = [
        Item("number", "black", box, "42"),
        Item("star", "green", box),
        Item("circle", "red", box),
    ]
    for _ in range(3):
        items = items[1:] + items[:1]
        assert caption_of(items) == "a red circle, a green star and the number 42"
    assert caption_of([Item("square", "green", box), *[Item("star", "blue", box)] * 2]) == (
        "a green square and two blue stars"
    )
    assert caption_of([Item("star", "orange", box)]) == "an orange star"


def test_questions_agree_with_the_items(plates):
    rng = random.Random(4)
    seen = Counter()
    canonical = 0
    for plate in plates:
        kinds = Counter(item.kind for item in plate.shapes)
        asked = questions(plate, rng)
        for qa in asked:
            seen[qa.category] += 1
            words = qa.question.lower().replace("colour", "color")
            if qa.category == "shape":
                assert kinds[qa.answer] >= 1
                if qa.question == CANONICAL["shape"]:
                    assert len(plate.shapes) == 1
                    canonical += 1
            elif qa.category == "color":
                owners = [item for item in plate.items if item.kind in words] or list(plate.items)
                assert [item.color for item in owners] == [qa.answer]
            elif qa.category == "count":
                kind = next((shape for shape in SHAPES if shape in words), None)
                color = next((color for color in COLORS if f"{color} " in words and kind), None)
                expected = [
                    item
                    for item in plate.shapes
                    if (kind is None or item.kind == kind) and (color is None or item.color == color)
                ]
                assert qa.answer == str(len(expected))
            elif qa.category == "number":
                assert qa.answer == plate.number.text
            elif qa.category == "position":
                kind = next(kind for kind in (*SHAPES, "number") if kind in words)
                color = next((color for color in COLORS if f"{color} {kind}" in words), None)
                (item,) = [item for item in plate.items if item.kind == kind and color in (None, item.color)]
                assert qa.answer == position_of(item, plate) in POSITIONS
            elif qa.category == "caption":
                assert qa.answer == caption_of(plate.items)
                assert sum(parse_caption(qa.answer).values()) == len(plate.items)
            else:
                values = [int(value) for value in qa.answer.split("[[")[1].split("]]")[0].split(", ")]
                assert len(values) == 4 and all(0 <= value <= 1000 for value in values)
                assert values[0] < values[2] and values[1] < values[3]
                assert qa.answer.split("<box>")[0] in qa.question
    assert set(seen) == set(CATEGORIES)
    assert canonical > 30


def test_box_is_relative_to_the_picture():
    plate = Plate(200, 100, (255, 255, 255), (Item("circle", "red", (20.0, 10.0, 60.0, 50.0)),))
    answers = [qa.answer for qa in questions(plate, random.Random(0)) if qa.category == "box"]
    assert answers == ["<ref>red circle</ref><box>[[100, 100, 300, 500]]</box>"]


def test_drawing_does_not_hold_up_training(plates):
    """Under a millisecond a picture on one core; the limit leaves room for slow machines."""
    rng = random.Random(5)
    start = time.process_time()
    for plate in plates:
        draw_plate(plate, rng)
    assert (time.process_time() - start) / len(plates) < 0.01


def test_evaluation_set_is_balanced_repeatable_and_canonical():
    pytest.importorskip("matplotlib")
    rows = list(evaluation_pictures.evaluation_set(count=60, seed=1))
    assert Counter(category for _, category, _, _ in rows) == dict.fromkeys(evaluation_pictures.CATEGORIES, 10)
    answers: dict[str, Counter] = {category: Counter() for category in evaluation_pictures.CATEGORIES}
    for image, category, question, answer in rows:
        assert image.mode == "RGB" and all(200 <= side <= 640 for side in image.size)
        assert len(image.getcolors(image.width * image.height)) > 1
        assert question.startswith(CANONICAL[category].split("{")[0])
        answers[category][str(len(answer)) if category == "number" else answer] += 1
    assert set(answers["shape"]) == set(SHAPES)
    assert set(answers["color"]) == set(COLORS)
    assert set(answers["position"]) == set(POSITIONS)
    assert set(answers["count"]) == set("12345")
    assert set(answers["number"]) == set("123")
    again = list(evaluation_pictures.evaluation_set(count=6, seed=1))
    assert [row[0].tobytes() for row in again] == [row[0].tobytes() for row in rows[:6]]
    assert [row[1:] for row in again] == [row[1:] for row in rows[:6]]


def test_evaluation_without_matplotlib_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install mono-internvl\[eval\]"):
        next(evaluation_pictures.evaluation_set(1))


def test_boxes_of_the_evaluation_are_where_the_shapes_are():
    pytest.importorskip("matplotlib")
    rows = list(evaluation_pictures.evaluation_set(24, 3, evaluation_pictures.BOXES))
    assert {category for _, category, _, _ in rows} == {"box"}
    for picture, _, question, answer in rows[::4]:  # one thing alone on the plate
        reference = question.split("<ref>")[1].split("</ref>")[0]
        assert f"<ref>{reference}</ref>" in answer
        pixels = np.asarray(picture).astype(int)
        thing = np.abs(pixels - pixels[0, 0]).max(-1) > 60
        rows_of, columns_of = np.flatnonzero(thing.any(1)), np.flatnonzero(thing.any(0))
        drawn = (columns_of[0], rows_of[0], columns_of[-1] + 1, rows_of[-1] + 1)
        scale = np.array([picture.width, picture.height] * 2) / 1000
        box = np.array(parse_box(answer)) * scale
        assert np.abs(box - drawn).max() < 2.5, (box, drawn)


def test_scores():
    for category, expected, right, wrong in (
        ("color", "red", " Red.\n", "dark red"),
        (
            "caption",
            "two blue stars and a green square",
            "a green square, a blue star and a blue star",
            "two blue stars",
        ),
        ("caption", "a red circle", "an red circle", "a red circle and a dog"),
        ("caption", "a red circle and the number 42", "an red circle, the number 42.", "a red circle"),
        ("box", "<box>[[100, 100, 200, 200]]</box>", "<box>[[110, 100, 200, 200]]</box>", "top left"),
    ):
        assert is_correct(category, expected, right) and not is_correct(category, expected, wrong)
    with pytest.raises(ValueError, match="plate world's words"):
        is_correct("caption", "a cat", "a cat")


def test_the_median_overlap_counts_answers_without_a_box_as_none():
    def outcome(category, expected, given):
        return Outcome(0, category, "", expected, given, False)

    right, half = "<box>[[0, 0, 10, 10]]</box>", "<box>[[0, 0, 10, 5]]</box>"
    boxes = [outcome("box", right, given) for given in (right, half, "a red circle")]
    assert PlateResults([*boxes, outcome("color", "red", "blue")], 1.0).median_iou == 0.5
    assert PlateResults([outcome("color", "red", "blue")], 1.0).median_iou is None


def test_box_iou():
    assert box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 10, 10), (10, 10, 20, 20)) == 0
    assert box_iou((10, 10, 0, 0), (0, 0, 10, 10)) == 0


# ----------------------------------------------------------------------------------------------- pictures of one number


def test_digits_of_a_study_stand_where_it_says(tmp_path):
    studies = [Study(3, 22, 8), Study(1, 30), Study(2, 12, 0, 112)]
    assert [study.category for study in studies] == ["3 digits, 22 px, at 8", "1 digit, 30 px", "2 digits, 12 px, at 0"]
    for study in studies:
        for seed in range(20):
            image, text = draw_number(random.Random(seed), study, [""])
            assert image.size == (study.side, study.side) and len(text) == study.digits == len(str(int(text)))
            ground = Image.new("RGB", image.size, image.getpixel((0, 0)))
            left, _, right, _ = ImageChops.difference(image, ground).getbbox()
            # Ink fills a cell but for its sides.
            assert right - left <= study.digits * study.width
            assert right - left > (study.digits - 0.8) * study.width
            if study.offset is not None:
                assert (left - study.offset) % 28 < 0.45 * study.width
    again = [draw_number(random.Random(3), studies[0], [""]) for _ in range(2)]
    assert again[0][1] == again[1][1] and again[0][0].tobytes() == again[1][0].tobytes()
    with pytest.raises(ValueError, match=r"3 digits, 90 px: no room for it in 224 px"):
        draw_number(random.Random(0), Study(3, 90), [""])


def test_pictures_of_numbers_are_records(tmp_path):
    pytest.importorskip("matplotlib", reason="brings the held-out fonts")
    held_out, training = font_files("held-out"), font_files("training")
    assert len(held_out) == 5 and all(Path(path).is_file() for path in held_out)
    assert "" in training and not set(held_out) & set(training)
    with pytest.raises(ValueError, match="'serif' is not one of held-out, training"):
        font_files("serif")
    assert write_pictures(tmp_path, [Study(3, 20), Study(1, 20)], 2, held_out, enlarge=2) == 4
    source = FileRecords(tmp_path / "numbers.jsonl")
    records = [source[index] for index in range(4)]
    assert [record.category for record in records] == ["3 digits, 20 px"] * 2 + ["1 digit, 20 px"] * 2
    assert picture_sizes(records[0].messages) == [(448, 448)]
    assert len({record.messages[0]["content"][1]["image"] for record in records}) == 4
    assert records[0].messages[0]["content"][-1]["text"].strip() == CANONICAL["number"]


def test_the_pictures_of_numbers_command(tmp_path):
    pytest.importorskip("matplotlib", reason="brings the held-out fonts")
    app = typer.Typer()
    app.command()(number_pictures.main)
    options = [str(tmp_path), "--digits", "2", "--widths", "12,20", "--offsets", "0,7", "--each", "1"]
    assert CliRunner().invoke(app, options).stdout == f"4 records: {tmp_path / 'numbers.jsonl'}\n"
    for words in (["--widths", "12,12"], ["--digits", "two"], ["--widths", "200"], ["--fonts", "serif"]):
        assert CliRunner().invoke(app, [str(tmp_path), "--each", "1", *words]).exit_code == 2
