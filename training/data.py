"""Conversations with pictures -> training tensors: `encode_conversation` for one, `Collator` for a batch."""

from collections.abc import Sequence
from typing import Any

import torch

from ..processing_mono_internvl import MonoInternVLProcessor


IGNORED = -100


def encode_conversation(
    processor: MonoInternVLProcessor, messages: list[dict[str, Any]], **image_options: Any
) -> dict[str, torch.Tensor]:
    """One conversation as `input_ids` and `labels`, int64 [T], and `pixel_values`, uint8 [tiles, patches, 3*28*28].

    Labels are the ids of each answer and its `<|im_end|>`, and -100 elsewhere. Pixels stay uint8, a quarter of the
    bytes to move; the model normalises them.

    Raises:
        ValueError: no answer in the conversation, or what the processor refuses.
    """
    encoded = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"do_normalize": False, **image_options},
    )
    ids, answers = torch.tensor(encoded["input_ids"][0]), torch.tensor(encoded["assistant_masks"][0])
    if not answers.any():
        raise ValueError("the conversation holds no answer to learn")
    patches = processor.tokens_per_tile
    pixels = torch.as_tensor(encoded["pixel_values"]) if "pixel_values" in encoded else None
    return {
        "input_ids": ids,
        "labels": torch.where(answers.bool(), ids, IGNORED),
        "pixel_values": torch.zeros(0, patches, 3 * 28 * 28, dtype=torch.uint8) if pixels is None else pixels,
    }


class Collator:
    """Pads conversations on the right and joins their tiles; a batch without a picture gets zero tiles."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def pad(name: str, filler: int) -> torch.Tensor:
            rows = [example[name] for example in examples]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        input_ids = pad("input_ids", self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad("labels", IGNORED),
            "pixel_values": torch.cat([example["pixel_values"] for example in examples]),
        }
