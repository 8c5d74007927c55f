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
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{**record, "images": [str(path.parent / name) for name in record["images"]]} for record in records]


def encode_record(processor: MonoInternVLProcessor, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` (the answers alone) and `pixel_values` of one record, see `encode_conversation`."""
    return encode_conversation(processor, read_messages(record, root=Path(), where=str(record["images"])))
