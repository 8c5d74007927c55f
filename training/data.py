"""Conversations with pictures -> training tensors: `encode_conversation` for one, the collators for a batch.

`Collator` pads: one row a conversation. `PackCollator` joins: one row a pack, positions restart with each conversation
and no attention mask is given, which is how attention knows where one ends (FlashAttention by its variable-length
kernel, flex and eager by a block mask, sdpa sample by sample).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import PATCH_DIM


IGNORED = -100

Example = dict[str, torch.Tensor]


def encode_conversation(
    processor: MonoInternVLProcessor, messages: list[dict[str, Any]], **image_options: Any
) -> Example:
    """One conversation as `input_ids` and `labels`, int64 [T], and `pixel_values`, uint8 [tiles, patches, 3*28*28].

    Labels are the ids of each answer and its `<|im_end|>`, and -100 elsewhere; an answer with `"train": False` is not
    learnt. Pixels stay uint8, a quarter of the bytes to move; the model normalises them.

    Raises:
        ValueError: no answer in the conversation to learn, a picture without tiles, or what the processor refuses.
    """
    learns = [message.get("train", True) for message in messages if message.get("role") == "assistant"]
    encoded = processor.apply_chat_template(
        [{key: value for key, value in message.items() if key != "train"} for message in messages],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"do_normalize": False, **image_options},
    )
    ids, answers = torch.tensor(encoded["input_ids"][0]), torch.tensor(encoded["assistant_masks"][0])
    if not all(learns):
        answers = _without(answers, learns)
    if not answers.any():
        raise ValueError("the conversation holds no answer to learn")
    patches = processor.tokens_per_tile
    pixels = torch.as_tensor(encoded["pixel_values"]) if "pixel_values" in encoded else None
    return {
        "input_ids": ids,
        "labels": torch.where(answers.bool(), ids, IGNORED),
        "pixel_values": torch.zeros(0, patches, PATCH_DIM, dtype=torch.uint8) if pixels is None else pixels,
    }


def _without(answers: torch.Tensor, learns: list[bool]) -> torch.Tensor:
    """The mask [T] of all answers without those that are not learnt; each answer is one run of ones."""
    starts = answers.bool() & ~torch.cat([torch.zeros(1, dtype=torch.bool), answers[:-1].bool()])
    if int(starts.sum()) != len(learns):
        raise ValueError("an answer is empty, so that those not to be learnt cannot be told from the others")
    number = (starts.cumsum(0) - 1).clamp(min=0)
    return answers * torch.tensor(learns)[number]


def target_weights(labels: torch.Tensor, weighting: str) -> torch.Tensor:
    """float32 [T], the weight of each label of one sample: 0 where it is -100 or nothing predicts it (the first).

    `token`: 1. `sample`: 1 / targets, so that every sample counts the same. `square`: 1 / sqrt(targets), between them
    (InternVL's default for packs).
    """
    weights = (labels != IGNORED).float()
    weights[0] = 0.0
    power = {"token": 0.0, "square": 0.5, "sample": 1.0}[weighting]
    return weights / weights.sum().clamp(min=1.0) ** power


class Collator:
    """Pads conversations on the right and joins their tiles; a batch without a picture gets zero tiles.

    Returns `input_ids`, `labels`, `attention_mask` int64 [B, T] and `pixel_values`; with a `weighting` also
    `loss_weights`, float32 [B, T].
    """

    def __init__(self, pad_token_id: int, weighting: str | None = None):
        self.pad_token_id, self.weighting = pad_token_id, weighting

    def __call__(self, examples: Sequence[Example]) -> Example:
        def pad(rows: list[torch.Tensor], filler: float) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        input_ids = pad([example["input_ids"] for example in examples], self.pad_token_id)
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad([example["labels"] for example in examples], IGNORED),
            "pixel_values": torch.cat([example["pixel_values"] for example in examples]),
        }
        if self.weighting:
            batch["loss_weights"] = pad([target_weights(e["labels"], self.weighting) for e in examples], 0.0)
        return batch


class PackCollator:
    """Joins the conversations of each pack into one row; packs of a batch are padded to the longest, or to `length`.

    Returns `input_ids`, `labels`, `position_ids` int64 [packs, T], `loss_weights` float32 [packs, T], `pixel_values`.
    Padding is a sample of its own: its positions restart, and nothing is learnt from it.
    """

    def __init__(self, pad_token_id: int, weighting: str = "token", length: int | None = None):
        self.pad_token_id, self.weighting, self.length = pad_token_id, weighting, length

    def __call__(self, packs: Sequence[Sequence[Example]]) -> Example:
        longest = max(sum(len(example["input_ids"]) for example in pack) for pack in packs)
        length = max(longest, self.length or 0)
        rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "loss_weights": []}
        for pack in packs:
            padding = length - sum(len(example["input_ids"]) for example in pack)
            labels = []
            for example in pack:
                # Nothing of the sample before predicts the first token of this one.
                kept = example["labels"].clone()
                kept[0] = IGNORED
                labels.append(kept)
            ends = [len(example["input_ids"]) for example in pack] + [padding]
            rows["input_ids"].append(
                torch.cat([*(e["input_ids"] for e in pack), torch.full((padding,), self.pad_token_id)])
            )
            rows["labels"].append(torch.cat([*labels, torch.full((padding,), IGNORED)]))
            rows["position_ids"].append(torch.cat([torch.arange(end) for end in ends]))
            rows["loss_weights"].append(
                torch.cat([*(target_weights(e["labels"], self.weighting) for e in pack), torch.zeros(padding)])
            )
        batch = {name: torch.stack(values) for name, values in rows.items()}
        batch["pixel_values"] = torch.cat([example["pixel_values"] for pack in packs for example in pack])
        return batch
