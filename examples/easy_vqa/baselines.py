"""What can be got right without looking: the most frequent answer, and the most frequent answer to each question.

python examples/easy_vqa/baselines.py data/easy_vqa
"""

from collections import Counter, defaultdict
from pathlib import Path

import typer

from mono_internvl.evaluation.records import questions_of
from mono_internvl.evaluation.scoring import normalize_answer
from mono_internvl.training.sources import FileRecords


def read(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of every answer of the records, as `mono-internvl evaluate` asks and compares them."""
    source, found = FileRecords(path), []
    for record in (source[index] for index in range(len(source))):
        for asked in questions_of(record.messages):
            found.append((str(asked.messages[-1]["content"]), normalize_answer(asked.expected)))
    return found


def shares(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> dict[str, float]:
    """Share of right answers by how they are given; what is most frequent is counted in `train`."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in train:
        by_question[question][answer] += 1
    every: Counter[str] = sum(by_question.values(), Counter())
    common = every.most_common(1)[0][0]
    guesses = {question: found.most_common(1)[0][0] for question, found in by_question.items()}
    return {
        f"one of the {len(every)} answers at random": 1 / len(every),
        f"always {common!r}": sum(answer == common for _, answer in test) / len(test),
        "each question's most frequent answer": sum(guesses.get(q, common) == answer for q, answer in test) / len(test),
    }


def main(folder: Path, split: str = "test") -> None:
    """Count in blind_train.jsonl of FOLDER, and judge by blind_SPLIT.jsonl."""
    for name, share in shares(read(folder / "blind_train.jsonl"), read(folder / f"blind_{split}.jsonl")).items():
        typer.echo(f"{name:<40}{share:7.1%}")


if __name__ == "__main__":
    typer.run(main)
