"""Training records for the examples beside this file, as `mono-internvl train` reads them (docs/training.md).

Pictures are named relative to the file.
"""

from pathlib import Path
from typing import Any

import torch

from mono_internvl import MonoInternVLProcessor
from mono_internvl.training.data import encode_conversation
from mono_internvl.training.records import read_record
from mono_internvl.training.sources import FileRecords


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records as `{"messages": [...], "images": [...]}`, whose contents are parts, which `datasets` can hold.

    Raises:
        ValueError: a record that cannot be used, by line and reason, or no record at all.
    """
    records = []
    source = FileRecords(path)
    for record in (source[index] for index in range(len(source))):
        messages, images = [], []
        for message in record.messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            images += [part["image"] for part in parts if part["type"] == "image"]
            parts = [{"type": "image"} if part["type"] == "image" else part for part in parts]
            messages.append({**message, "content": parts})
        records.append({"messages": messages, "images": images})
    return records


def encode_record(processor: MonoInternVLProcessor, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` (the answers alone) and `pixel_values` of one record, see `encode_conversation`."""
    return encode_conversation(processor, read_record(record))
