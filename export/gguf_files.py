"""Writing one GGUF file a piece at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from ..conversion.writer import is_finite, naming
from .gguf_tensors import VALUES_AT_ONCE, GgufTensor


# The disk is kept busy while pieces are made: all at once in the end would take as long again.
_SYNC_BYTES = 256 << 20


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


class _Behind:
    """Writes to a file one piece behind those that make them, and brings what is written to the disk meanwhile."""

    def __init__(self, file: IO[bytes]):
        self._file, self._unsynced = file, 0
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._writing: Future[int] | None = None
        self._syncing: Future[None] | None = None

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
                if self._syncing is not None:
                    self._syncing.result()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._syncer.shutdown(cancel_futures=True)

    def wait(self) -> None:
        if self._writing is not None:
            self._unsynced += self._writing.result()
            self._writing = None

    def write(self, data: memoryview) -> None:
        self.wait()
        self._writing = self._writer.submit(self._file.write, data)
        if self._unsynced > _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._unsynced = 0
            self._syncing = self._syncer.submit(os.fsync, self._file.fileno())


def _write_tensors(writer: GGUFWriter, tensors: list[GgufTensor], count: Callable[[int], None]) -> list[str]:
    assert writer.fout is not None
    (file,) = writer.fout
    not_finite = []
    with _Behind(file) as behind:
        for tensor in tensors:
            behind.wait()
            writer.write_padding(file, file.tell())
            written, finite = 0, True
            for rows in tensor.rows():
                for piece in rows.split(max(VALUES_AT_ONCE // max(rows[0].numel(), 1), 1)):
                    finite = finite and is_finite(piece)
                    data = encoded(piece, tensor.type, tensor.name)
                    behind.write(data)
                    written += data.nbytes
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
        if is_finite(values) and not is_finite(half):
            raise ValueError(f"{name} holds values beyond float16, such as {float(values.abs().max()):.3g}: use bf16")
        array = half.numpy()
    else:
        array = quants.quantize(values.float().numpy(), kind)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
