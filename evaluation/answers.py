"""Greedy answers to batches of conversations, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor


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
    """Outcomes in the order of the questions, and the wall time of answering in seconds."""

    outcomes: list[Outcome]
    seconds: float

    @property
    def scores(self) -> dict[str, tuple[int, int]]:
        """(correct, total) by category, in order of first appearance."""
        scores: dict[str, tuple[int, int]] = {}
        for outcome in self.outcomes:
            correct, total = scores.get(outcome.category, (0, 0))
            scores[outcome.category] = (correct + outcome.correct, total + 1)
        return scores

    @property
    def errors(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.correct]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        scores = {name: {"correct": right, "total": total} for name, (right, total) in self.scores.items()}
        return {
            "categories": scores,
            "correct": len(self.outcomes) - len(self.errors),
            "total": len(self.outcomes),
            "seconds": round(self.seconds, 2),
            "outcomes": [outcome._asdict() for outcome in self.outcomes],
        }


@torch.no_grad()
def answer_conversations(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    *,
    max_tiles: int | str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy answers to chat messages that end with a question, in one batch; the texts that `chat` gives one by one.

    Args:
        max_tiles: most tiles of the pictures of a conversation; default: the processor's.
    """
    inputs = processor.apply_chat_template(
        list(conversations),
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
