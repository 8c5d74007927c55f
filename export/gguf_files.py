"""Writing one GGUF file a piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from ..conversion.writer import naming
from .gguf_tensors import GgufTensor


# Rows that are converted at once: a piece, in float32 and in its copy, bounds the memory.
_VALUES_AT_ONCE = 4 << 20


def write_gguf(writer: GGUFWriter, path: Path, tensors: list[GgufTensor], count: Callable[[int], None]) -> list[str]:
    """The file of what `writer` was told and of these tensors; `count` is called with the bytes written.

    Returns:
        Names of tensors with NaN or infinite values.

    Raises:
        OSError: the disk refuses; names the file.
        ValueError: a value does not fit float16; names the tensor.
    """
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    with naming(path):
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            not_finite = _write_tensors(writer, tensors, count)
        finally:
            # Also where the disk is full, and the last bytes that closing would write are refused again.
            writer.close()
    return not_finite


def _write_tensors(writer: GGUFWriter, tensors: list[GgufTensor], count: Callable[[int], None]) -> list[str]:
    assert writer.fout is not None
    (file,) = writer.fout
    not_finite = []
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        written, finite = 0, True
        for rows in tensor.rows():
            for piece in rows.split(max(_VALUES_AT_ONCE // max(rows[0].numel(), 1), 1)):
                finite = finite and bool(torch.isfinite(piece.sum(dtype=torch.float32)) or torch.isfinite(piece).all())
                data = encoded(piece, tensor.type, tensor.name)
                written += file.write(data)
                count(data.nbytes)
        if written != tensor.nbytes:
            raise AssertionError(f"{tensor.name}: {written} bytes were written, {tensor.nbytes} announced")
        if not finite:
            not_finite.append(tensor.name)
    writer.write_padding(file, file.tell())
    return not_finite


def encoded(values: torch.Tensor, kind: GGMLQuantizationType, name: str) -> memoryview:
    """Rows of values as the bytes of a type; a dtype that is the type's own keeps every bit.

    Raises:
        ValueError: values beyond float16's largest, which would become infinite; names the tensor.
    """
    if kind == GGMLQuantizationType.F32:
        array = values.float().numpy()
    elif kind == GGMLQuantizationType.BF16:
        array = values.bfloat16().view(torch.int16).numpy()
    elif kind == GGMLQuantizationType.F16:
        half = values.half()
        if bool((torch.isinf(half) & torch.isfinite(values)).any()):
            raise ValueError(f"{name} holds values beyond float16, such as {float(values.abs().max()):.3g}: use bf16")
        array = half.numpy()
    else:
        array = quants.quantize(values.float().numpy(), kind)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
