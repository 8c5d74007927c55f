"""Training records for the examples beside this file: a JSON object a line, `{"messages": [...], "images": [...]}`.

`<image>` in a message marks a picture's place; pictures are named relative to the file.
"""

import json
from pathlib import Path
from typing import Any

import torch

from mono_internvl import MonoInternVLProcessor
from mono_internvl.training.data import encode_conversation


def read_records(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{**record, "images": [str(path.parent / name) for name in record["images"]]} for record in records]


def encode_record(processor: MonoInternVLProcessor, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` (the answers alone) and `pixel_values` of one record, see `encode_conversation`."""
    texts = [message["content"] for message in record["messages"]]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    return encode_conversation(processor, processor.conversation(turns, record["images"]))
