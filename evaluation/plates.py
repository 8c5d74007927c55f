"""Asks a model the questions of the plate world, in batches, and scores its answers.

results = evaluate(model, processor, evaluation_set(count=500, seed=0))
results.scores                      {"shape": (81, 84), ...}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor
from .answers import MAX_NEW_TOKENS, Outcome, Results, answer_conversations
from .scoring import answer_iou, is_correct


@dataclass(frozen=True)
class PlateResults(Results):
    """What came of the plate world's questions."""

    @property
    def median_iou(self) -> float | None:
        """Median overlap of the boxes asked for, 0 where an answer holds none; None without such questions."""
        overlaps = [answer_iou(o.expected, o.given) for o in self.outcomes if o.category == "box"]
        return statistics.median(overlaps) if overlaps else None

    def to_dict(self) -> dict[str, Any]:
        return {"median_iou": self.median_iou, **super().to_dict()}


def evaluate(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    examples: Iterable[tuple[Image.Image, str, str, str]],
    *,
    batch_size: int = 16,
    max_tiles: int | str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> PlateResults:
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
        given = answer_conversations(
            model,
            processor,
            [
                processor.conversation([(f"<image>\n{question}", None)], [picture])
                for _, (picture, _, question, _) in batch
            ],
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
    return PlateResults(sorted(outcomes), time.monotonic() - start)
