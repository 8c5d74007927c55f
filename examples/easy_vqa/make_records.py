"""easy-VQA (PyPI: easy-vqa, MIT) as records that `mono-internvl train` and `evaluate` read (docs/training.md, Data):

    pip install easy-vqa
    python examples/easy_vqa/make_records.py data/easy_vqa

`data/easy_vqa/` then holds the pictures and these files:

    train.jsonl         nine of ten pictures of the training split; questions of a picture are turns of a record
    val.jsonl           the others, a question a record; for every choice made on the way
    test.jsonl          the test split, a question a record; to be scored once
    blind_*.jsonl       the same questions and answers without their pictures, a question a record
"""

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from mono_internvl.common.files import written_whole


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
Asked = list[tuple[str, str]]


def category_of(answer: str) -> str:
    """What a question asks for, by its answer."""
    for name, answers in (("yes or no", ("yes", "no")), ("color", COLORS), ("shape", SHAPES)):
        if answer in answers:
            return name
    raise ValueError(f"easy-VQA has no answer {answer!r}")


def by_picture(texts: Iterable[str], answers: Iterable[str], pictures: Iterable[int]) -> dict[int, Asked]:
    """(question, answer) pairs by the number of their picture, from the three lists that the package gives."""
    found: dict[int, Asked] = {}
    for text, answer, picture in zip(texts, answers, pictures, strict=True):
        found.setdefault(picture, []).append((text, answer))
    return dict(sorted(found.items()))


def record_of(name: str, asked: Asked, picture: str | None) -> dict[str, Any]:
    """One conversation; the picture stands in front of its first question."""
    turns = []
    for number, (question, answer) in enumerate(asked):
        mark = "<image>\n" if picture is not None and number == 0 else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {"id": name, "conversations": turns}
    if picture is not None:
        record["image"] = picture
    categories = {category_of(answer) for _, answer in asked}
    if len(asked) == 1:
        record["category"] = categories.pop()
    return record


def records_of(
    split: str, questions: dict[int, Asked], *, turns: int = 1, blind: bool = False
) -> Iterator[dict[str, Any]]:
    """The records of some pictures, up to `turns` questions in each."""
    for number, asked in questions.items():
        for first in range(0, len(asked), turns):
            picture = None if blind else f"pictures/{split}/{number}.png"
            yield record_of(f"{split}-{number}-{first}", asked[first : first + turns], picture)


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record) for record in records]
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    typer.echo(f"{path}: {len(lines):,} records")


def main(out: Path, turns: int = 4, validation: float = 0.1, seed: int = 0) -> None:
    """Write the records and pictures of easy-VQA to OUT, TURNS questions in a record of training."""
    try:
        from easy_vqa import get_test_image_paths, get_test_questions, get_train_image_paths, get_train_questions
    except ImportError as error:
        raise typer.BadParameter("the data set is a package of PyPI: pip install easy-vqa") from error

    for split, pictures in (("train", get_train_image_paths()), ("test", get_test_image_paths())):
        folder = out / "pictures" / split
        folder.mkdir(parents=True, exist_ok=True)
        for path in pictures.values():
            shutil.copyfile(path, folder / Path(path).name)

    rng = random.Random(seed)
    questions = by_picture(*get_train_questions())
    for asked in questions.values():
        # The package lists them in no order; another seed puts others together.
        rng.shuffle(asked)
    numbers = sorted(questions)
    rng.shuffle(numbers)
    held = set(numbers[: round(validation * len(numbers))])
    parts = {
        "train": ("train", {number: asked for number, asked in questions.items() if number not in held}),
        "val": ("train", {number: asked for number, asked in questions.items() if number in held}),
        "test": ("test", by_picture(*get_test_questions())),
    }
    for name, (split, part) in parts.items():
        write(out / f"{name}.jsonl", records_of(split, part, turns=turns if name == "train" else 1))
        write(out / f"blind_{name}.jsonl", records_of(split, part, blind=True))


if __name__ == "__main__":
    typer.run(main)
