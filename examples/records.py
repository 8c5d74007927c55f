"""Training records for the examples beside this file: a JSON object a line, `{"messages": [...], "images": [...]}`.

`<image>` in a message marks a picture's place; pictures are named relative to the file.
"""

import json
from pathlib import Path
from typing import Any

import torch

from mono_internvl import MonoInternVLProcessor
from mono_internvl.training.data import encode_conversation
from mono_internvl.training.sources import read_messages


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records, with paths for pictures.

    Raises:
        ValueError: a line that is no record, or no line at all.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            pictures = [str(path.parent / name) for name in record.get("images", [])]
            records.append({"messages": record["messages"], "images": pictures})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}, line {number}: not {{"messages": [...], "images": [...]}}: {error!r}') from error
    if not records:
        raise ValueError(f"{path} holds no record")
    return records


def encode_record(processor: MonoInternVLProcessor, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` (the answers alone) and `pixel_values` of one record, see `encode_conversation`."""
    return encode_conversation(processor, read_messages(record, root=Path(), where=str(record["images"])))
