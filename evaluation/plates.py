"""Asks a model the questions of the plate world, in batches, and scores its answers.

results = evaluate(model, processor, evaluation_set(count=500, seed=0))
results.scores                      {"shape": (81, 84), ...}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor
from .scoring import answer_iou, is_correct, score_answers


# The longest caption of five shapes and a number needs fewer.
MAX_NEW_TOKENS = 64


class Outcome(NamedTuple):
    """One question of the set; `place` is where it stands there, from 0."""

    place: int
    category: str
    question: str
    expected: str
    given: str
    correct: bool


@dataclass(frozen=True)
class Results:
    """Outcomes in the order of the examples, and the wall time of answering in seconds."""

    outcomes: list[Outcome]
    seconds: float

    @property
    def scores(self) -> dict[str, tuple[int, int]]:
        """(correct, total) by category, in order of first appearance."""
        return score_answers((outcome.category, outcome.expected, outcome.given) for outcome in self.outcomes)

    @property
    def errors(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.correct]

    @property
    def median_iou(self) -> float | None:
        """Median overlap of the boxes asked for, 0 where an answer holds none; None without such questions."""
        overlaps = [answer_iou(o.expected, o.given) for o in self.outcomes if o.category == "box"]
        return statistics.median(overlaps) if overlaps else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        scores = {name: {"correct": right, "total": total} for name, (right, total) in self.scores.items()}
        return {
            "categories": scores,
            "correct": len(self.outcomes) - len(self.errors),
            "total": len(self.outcomes),
            "median_iou": self.median_iou,
            "seconds": round(self.seconds, 2),
            "outcomes": [outcome._asdict() for outcome in self.outcomes],
        }


@torch.no_grad()
def evaluate(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    examples: Iterable[tuple[Image.Image, str, str, str]],
    *,
    batch_size: int = 16,
    max_tiles: int | str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Results:
    """Answer every question greedily, each in a conversation of its own.

    Args:
        examples: (picture, category, question, expected answer), as `evaluation_set` yields them.
        batch_size: questions answered at once, padded on the left.
        max_tiles: most tiles of a picture, or "auto"; default: the processor's.
        progress: called with the number of questions answered so far.
    """
    start = time.monotonic()
    outcomes: list[Outcome] = []
    waiting: dict[int, list[tuple[int, tuple[Image.Image, str, str, str]]]] = {}

    def answer(batch: list[tuple[int, tuple[Image.Image, str, str, str]]]) -> None:
        given = answer_batch(
            model,
            processor,
            [(picture, question) for _, (picture, _, question, _) in batch],
            max_tiles=max_tiles,
            max_new_tokens=max_new_tokens,
        )
        for (index, (_, category, question, expected)), text in zip(batch, given, strict=True):
            outcomes.append(Outcome(index, category, question, expected, text, is_correct(category, expected, text)))
        if progress is not None:
            progress(len(outcomes))

    # Pictures of as many tiles go together, so that little is padded.
    for index, example in enumerate(examples):
        width, height = example[0].size
        group = waiting.setdefault(
            processor.image_processor.get_number_of_tiles(height, width, max_tiles=max_tiles), []
        )
        group.append((index, example))
        if len(group) == batch_size:
            answer(group)
            group.clear()
    rest = [item for tiles in sorted(waiting) for item in waiting[tiles]]
    for first in range(0, len(rest), batch_size):
        answer(rest[first : first + batch_size])
    return Results(sorted(outcomes), time.monotonic() - start)


@torch.no_grad()
def answer_batch(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    questions: list[tuple[Image.Image, str]],
    *,
    max_tiles: int | str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy answers to (picture, question) pairs, in one batch; the same texts as `chat` gives one by one."""
    conversations = [processor.conversation([(f"<image>\n{text}", None)], [picture]) for picture, text in questions]
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding_side": "left", **({} if max_tiles is None else {"max_tiles": max_tiles})},
    ).to(model.device, model.dtype)
    sequences = model.generate(
        **inputs,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    decode = processor.answer_decoder()
    return [decode(row) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
