"""Asks a model what records of training ask, and compares its answers with theirs, word for word.

    questions = list(questions_of(record.messages))
    answer_records(model, processor, questions).scores          {"questions": (8, 9)}

Every answer that the record would teach is one question, asked after the turns before it as the record has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..common.record import picture_sizes
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor
from .answers import MAX_NEW_TOKENS, Outcome, Results, answer_conversations
from .scoring import normalize_answer


# Of questions whose record names no category.
UNNAMED = "questions"


class Question(NamedTuple):
    """Chat messages that end with a question, and the answer that is right; `max_tiles` as in a `Record`."""

    messages: list[dict[str, Any]]
    expected: str
    category: str = UNNAMED
    max_tiles: int | str | None = None


def questions_of(
    messages: Sequence[dict[str, Any]], category: str = UNNAMED, max_tiles: int | str | None = None
) -> Iterator[Question]:
    """The questions of one conversation, as `training.records.read_record` gives it.

    Raises:
        ValueError: it holds no answer to ask for.
    """
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    places = [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("train", True) and place
    ]
    if not places:
        raise ValueError("the conversation holds no answer to ask for")
    for place in places:
        yield Question(plain[:place], _text(messages[place]), category, max_tiles)


def _text(message: dict[str, Any]) -> str:
    """What a message says, with `<image>` where a picture stands."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def answer_records(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    max_tiles: int | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Results:
    """Answer every question greedily.

    Right is what `normalize_answer` makes equal: case, white space and one final period do not count. Answers may be
    eight tokens longer than the longest that is right, and 64 at least.

    Args:
        batch_size: questions answered at once, padded on the left; those of one length go together.
        max_tiles: most tiles of the pictures of a question; default: the processor's. A question may allow fewer.
        progress: called with the number of questions answered so far.
    """
    start = time.monotonic()
    limit = processor.image_processor.max_tiles if max_tiles is None else max_tiles
    tiles = [limit if q.max_tiles is None else min(q.max_tiles, limit) for q in questions]
    lengths = [
        processor.count_tokens(q.messages, picture_sizes(q.messages), max_tiles=most)
        for q, most in zip(questions, tiles, strict=True)
    ]
    wanted = {q.expected for q in questions}
    longest = max((len(processor.tokenizer.encode(text, add_special_tokens=False)) for text in wanted), default=0)
    order = sorted(range(len(questions)), key=lambda place: (tiles[place], lengths[place], place))
    outcomes: list[Outcome] = []
    while len(outcomes) < len(order):
        batch = order[len(outcomes) : len(outcomes) + batch_size]
        batch = [place for place in batch if tiles[place] == tiles[batch[0]]]
        given = answer_conversations(
            model,
            processor,
            [questions[place].messages for place in batch],
            max_tiles=tiles[batch[0]],
            max_new_tokens=max(MAX_NEW_TOKENS, longest + 8),
        )
        for place, text in zip(batch, given, strict=True):
            question = questions[place]
            correct = normalize_answer(text) == normalize_answer(question.expected)
            asked = _text(question.messages[-1])
            outcomes.append(Outcome(place, question.category, asked, question.expected, text, correct))
        if progress is not None:
            progress(len(outcomes))
    return Results(sorted(outcomes), time.monotonic() - start)
