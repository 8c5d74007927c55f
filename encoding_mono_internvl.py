"""Segments of a prompt -> ids of rows: each stretch by its origin, pictures expanded, truncated and padded.

Control tokens are recognised in the template's own parts only, the grounding tags (`<ref>`, `<box>`, `<quad>`)
everywhere. Neighbouring stretches of plain text are encoded as one, exactly as the finished string would be.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature

from .chat_template_mono_internvl import Segment
from .image_processing_mono_internvl import flatten_pictures
from .vocabulary_mono_internvl import IMAGE_TOKEN, QUERY_TOKEN, Vocabulary


class MonoInternVLInputs(BatchFeature):
    """The processor's tensors. Labels that are put among them never hold placeholders, whose targets become -100.

    Others' collators copy the ids (TRL's for pictures, most in tutorials), and not every loss over their labels is the
    model's own: TRL's fused head, its DFT and label smoothing count what they are given.
    """

    placeholder_ids: tuple[int, ...] = ()

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "labels":
            if isinstance(value, torch.Tensor):
                ids = self.data.get("input_ids")
                # In place, as whoever made the labels may go on changing them; but not where they are the ids.
                shared = isinstance(ids, torch.Tensor) and value.data_ptr() == ids.data_ptr()
                value = value.clone() if shared else value
                for token in self.placeholder_ids:
                    value.masked_fill_(value.eq(token), -100)
            else:
                value = self._without_placeholders(value)
        super().__setitem__(key, value)

    def _without_placeholders(self, labels: Any) -> Any:
        if hasattr(labels, "tolist"):
            labels = labels.tolist()
        if isinstance(labels, (list, tuple)):
            return [self._without_placeholders(label) for label in labels]
        return -100 if labels in self.placeholder_ids else labels


def _expand(
    pieces: list[tuple[int | str, bool]], tokens: list[int], vocabulary: Vocabulary
) -> list[tuple[int | str, bool]]:
    """One placeholder (or an already expanded run of them) per picture -> as many as it has visual tokens, between
    `<img>` and `</img>`."""
    image, start, end = vocabulary.image_token_ids
    total = sum(piece == image for piece, _ in pieces)
    out: list[tuple[int | str, bool]] = []
    picture, i = 0, 0
    while i < len(pieces):
        if pieces[i][0] != image:
            out.append(pieces[i])
            i += 1
            continue
        run = i
        while i < len(pieces) and pieces[i][0] == image:
            i += 1
        length = i - run
        while length:
            if picture >= len(tokens):
                picture += 1 if total == len(tokens) else length
                break
            count = tokens[picture]
            # Where there are as many placeholders as pictures, each is one.
            taken = 1 if total == len(tokens) or i - run == 1 else count
            if taken > length:
                raise ValueError(
                    f"picture {picture + 1} has {count} visual tokens, "
                    f"but the text holds {length} placeholders for it; give 1 or {count}"
                )
            length -= taken
            if out[-1:] != [(start, False)]:
                out.append((start, False))
            out += [(image, False)] * count
            if length or pieces[i : i + 1] != [(end, False)]:
                out.append((end, False))
            picture += 1
    if picture != len(tokens):
        raise ValueError(
            f"{picture} image placeholders in the text for {len(tokens)} pictures; they must match "
            f"({IMAGE_TOKEN} stands for a picture)"
        )
    return out


def placeholder_runs(text: str) -> list[str]:
    return re.findall(f"(?:{re.escape(IMAGE_TOKEN)})+", text)


# A tokenizer without a longest text has a number beyond this one.
_NO_LIMIT = 10**9


def _expand_queries(
    pieces: list[tuple[int | str, bool]], size: int, pictures: int, vocabulary: Vocabulary
) -> list[tuple[int | str, bool]]:
    """One placeholder, or a run of `size`, per block of learnable queries -> `size` of them.

    Raises:
        ValueError: a prompt with pictures and without a block, or the other way round, or a run of another length; by
            what is there and what is wanted.
    """
    query = vocabulary.query_token_id
    out: list[tuple[int | str, bool]] = []
    blocks = 0
    for is_query, run in itertools.groupby(pieces, key=lambda piece: query is not None and piece[0] == query):
        found = list(run)
        if not is_query:
            out += found
            continue
        if len(found) not in (1, size):
            raise ValueError(
                f"{len(found)} {QUERY_TOKEN} stand together; a block of learnable queries is one, or "
                + (f"{size}" if size else "none, since this processor has none")
            )
        blocks += 1
        out += [(query, False)] * size  # type: ignore[list-item]
    if bool(blocks) != bool(pictures and size):
        raise ValueError(
            f"{blocks} blocks of learnable queries ({QUERY_TOKEN}) for {pictures} pictures, and the processor has "
            f"num_learnable_queries={size}: they come with pictures; apply_chat_template puts them in their places, if "
            f"the template writes {QUERY_TOKEN} for parts of type 'queries'"
        )
    return out


def encode(
    prompt: Iterable[Segment], tokens: list[int] | None, vocabulary: Vocabulary, queries: int = 0
) -> tuple[list[int], list[int]]:
    """Segments -> ids, and 1 where an answer or the end of its turn (`<|im_end|>`) is.

    `tokens`: visual tokens of each picture; None leaves placeholders as they stand. `queries`: learnable queries of a
    block.
    """
    end_of_turn = vocabulary.end_ids[0]
    pieces: list[tuple[int | str, bool]] = []
    answered = False
    pictures = vocabulary.visual_ids
    for text, origin, learnt in prompt:
        template = origin == "template"
        table, pattern = (
            (vocabulary.fixed, vocabulary.template_pattern)
            if template
            else (vocabulary.content, vocabulary.content_pattern)
        )
        for i, piece in enumerate(pattern.split(text)):
            if piece == "" and i % 2 == 0:
                continue
            token = table[piece] if i % 2 else piece
            if learnt is None:
                written = origin == "answer" or (template and answered and token == end_of_turn)
            else:
                written = learnt and token not in pictures
            pieces.append((token, written))
            answered = False
        answered = origin == "answer"
    if tokens is not None:
        pieces = _expand_queries(_expand(pieces, tokens, vocabulary), queries, len(tokens), vocabulary)

    ids: list[int] = []
    answers: list[int] = []
    for is_text, run in itertools.groupby(pieces, key=lambda piece: isinstance(piece[0], str)):
        if not is_text:
            for token, is_answer in run:
                ids.append(token)  # type: ignore[arg-type]
                answers.append(int(is_answer))
            continue
        text, owned = "", bytearray()
        for part, is_answer in run:
            text += part  # type: ignore[operator]
            owned += bytes([is_answer]) * len(part)  # type: ignore[arg-type]
        encoded = vocabulary.encode(text)
        ids += encoded.ids
        answers += [int(any(owned[start : max(end, start + 1)])) for start, end in encoded.offsets]
    return ids, answers


def truncate(
    tokenizer: Any, pictures: Iterable[int], ids: list[int], answers: list[int], limit: int | None
) -> tuple[list[int], list[int]]:
    limit = tokenizer.model_max_length if limit is None else limit
    excess = len(ids) - limit
    if excess <= 0:
        return ids, answers
    kept, removed = slice(0, limit), ids[limit:]
    if tokenizer.truncation_side == "left":
        kept, removed = slice(excess, None), ids[:excess]
    if not set(pictures).isdisjoint(removed):
        raise ValueError(
            f"truncation to max_length={limit} would cut a picture out of a prompt of {len(ids)} tokens; "
            "raise max_length or lower max_tiles"
        )
    return ids[kept], answers[kept]


def pad(
    tokenizer: Any, rows: dict[str, list[list[int]]], options: dict[str, Any], return_tensors: str | None
) -> dict[str, list[list[int]]]:
    """Pad all rows alike; adds `attention_mask`."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    padding = options.get("padding")
    if padding is None:
        padding = return_tensors is not None
    side = options.get("padding_side") or tokenizer.padding_side
    target = 0
    if padding == "max_length":
        target = options.get("max_length") or tokenizer.model_max_length
        if target > _NO_LIMIT:
            raise ValueError("padding='max_length' needs max_length; the tokenizer has none of its own")
    elif padding and padding != "do_not_pad":
        target = max(lengths)
    elif return_tensors is not None and len(set(lengths)) > 1:
        raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens make no tensor without padding")
    multiple = options.get("pad_to_multiple_of") or 1
    target = -(-target // multiple) * multiple

    def padded(row: list[int], filler: int) -> list[int]:
        missing = [filler] * max(target - len(row), 0)
        return missing + row if side == "left" else row + missing

    return {
        "input_ids": [padded(row, tokenizer.pad_token_id) for row in rows["input_ids"]],
        "attention_mask": [padded([1] * length, 0) for length in lengths],
        "assistant_masks": [padded(row, 0) for row in rows["assistant_masks"]],
    }


def deal_out(images: Any, prompts: list[list[Segment]]) -> list[list[Any] | None]:
    """Deal pictures out to prompts; None for a prompt means that its pictures were not given at all."""
    if images is None:
        return [None] * len(prompts)
    if isinstance(images, (list, tuple)) and any(isinstance(group, (list, tuple)) for group in images):
        if not all(group is None or isinstance(group, (list, tuple)) for group in images):
            raise ValueError("images mixes pictures with lists of pictures; give one list per prompt")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} lists of pictures for {len(prompts)} prompts; give one list per prompt")
        return [flatten_pictures(group or []) for group in images]
    images = flatten_pictures(images)
    if len(prompts) == 1:
        return [images]
    runs = [
        [run.count(IMAGE_TOKEN) for segment in prompt for run in placeholder_runs(segment.text)] for prompt in prompts
    ]
    wanted = [sum(lengths) for lengths in runs]
    if sum(wanted) != len(images):
        wanted = [len(lengths) for lengths in runs]  # expanded already
    if sum(wanted) != len(images):
        raise ValueError(f"{sum(wanted)} image placeholders in the prompts for {len(images)} pictures; they must match")
    left = iter(images)
    return [[next(left) for _ in range(count)] for count in wanted]


def placed(pixels: Any, options: dict[str, Any]) -> Any:
    device = options.get("device")
    return pixels.to(device) if device is not None and isinstance(pixels, torch.Tensor) else pixels
