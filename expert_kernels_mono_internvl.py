"""Triton kernels for two routed experts: rows are gathered, multiplied and written back in one launch for both.

    swiglu    out[r] = silu(x[r] gate.T) * (x[r] up.T)     gate and up of the row's expert, one launch
    linear    out[r] = x[r] weight.T                       down, and the attention experts' projections

A program computes one tile of [BLOCK_M rows of one expert, BLOCK_N columns]: tiles of text rows come first, then those
of visual rows, so a tile never mixes experts and an empty group has no tile. Rows are read where the plan says and
written to the same place, so nothing is copied before or after. Sums are float32 and are rounded where separate
operations round, so the result is the plain path's up to the order of a sum.

Which calls come here is decided in `experts_mono_internvl.py`, which alone imports this file, and only when it is used.

Shapes: N rows, H inputs, I outputs; weights [I, H] as in `torch.nn.Linear`.
"""

import contextvars
import subprocess
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch


# In `try`, or transformers would refuse to load this file as remote code where Triton is not installed.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

if not (hasattr(tl, "make_tensor_descriptor") and hasattr(triton, "set_allocator")):
    raise ImportError(f"Triton {triton.__version__} has no tensor descriptors, 3.4 or newer has")


class Blocks(NamedTuple):
    """Sizes of a program's tile, and how it is pipelined: stages of loads, warps."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


# The fastest blocks for N * I outputs and more, measured on an H200 in bfloat16 at the 2B dimensions
# (docs/performance.md). Few outputs get small tiles: the card has 132 processors, and each should have one.
SWIGLU_BLOCKS = ((4 << 20, Blocks(128, 128, 64, 4, 8)), (0, Blocks(64, 128, 64, 4, 4)))
LINEAR_BLOCKS = (
    (4 << 20, Blocks(128, 256, 64, 4, 8)),
    (3 << 19, Blocks(128, 128, 64, 4, 8)),
    (0, Blocks(64, 128, 128, 3, 4)),
)
# Products of float32 are made without tensor cores; its tiles take twice the memory.
FLOAT32_BLOCKS = Blocks(64, 64, 32, 2, 4)
# Tiles of so many row blocks are computed one after the other, so that they find the same weights in the cache.
GROUP_M = 8


class NotReady(RuntimeError):
    """A CUDA graph cannot be captured over a kernel's first run, which compiles and loads it."""


# What building or launching a kernel can fail with; the plain path is the answer to each.
FAILURES = (triton.TritonError, RuntimeError, OSError, subprocess.SubprocessError)
# Group sizes change with every prompt. Triton would compile anew for those that 16 divides and for 1.
_VARYING = ["text", "visual", "n_text", "n_visual"]


@triton.jit
def _tile(n_text, n_visual, columns: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's block of rows and of columns, and how many blocks of rows are text."""
    program = tl.program_id(0)
    text_blocks = tl.cdiv(n_text, BLOCK_M)
    row_blocks = text_blocks + tl.cdiv(n_visual, BLOCK_M)
    in_group = GROUP * tl.cdiv(columns, BLOCK_N)
    first = (program // in_group) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + (program % in_group) % size, (program % in_group) // size, text_blocks


# Under TRITON_INTERPRET=1, set before Triton is imported, kernels are run on the CPU, tile by tile in NumPy.
INTERPRETED = not isinstance(_tile, triton.JITFunction)
# The interpreter multiplies the bits of bfloat16 as integers and cuts them off when it converts to it (3.6 to 3.9):
# there values are float32 while they are computed with, and are rounded by `_rounded`.
_EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def _operand(values):
    """A block as `tl.dot` takes it."""
    if _EMULATED:
        values = values.to(tl.float32)
    return values


@triton.jit
def _rounded(values, out):
    """float32 values as out's dtype has them, in float32."""
    if not _EMULATED:
        values = values.to(out.dtype.element_ty).to(tl.float32)
    elif out.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values


@triton.jit
def _rows(text, visual, n_text, n_visual, row_block, text_blocks, BLOCK_M: tl.constexpr):
    """int64 [BLOCK_M]: the rows of a block, and which of them there are; the others are row 0 and are not written."""
    if row_block < text_blocks:
        index = text
        count = n_text
        start = row_block * BLOCK_M
    else:
        index = visual
        count = n_visual
        start = (row_block - text_blocks) * BLOCK_M
    places = start + tl.arange(0, BLOCK_M)
    live = places < count
    return tl.load(index + places, mask=live, other=0).to(tl.int64), live


@triton.jit
def _store(out, values, rows, live, column_block, N: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = live[:, None]
    if N % BLOCK_N != 0:
        mask = mask & (columns < N)[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], _rounded(values, out).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _linear_kernel(
    x,
    weight_text,
    weight_visual,
    out,
    text,
    visual,
    n_text,
    n_visual,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, column_block, text_blocks = _tile(n_text, n_visual, N, BLOCK_M, BLOCK_N, GROUP)
    if row_block < text_blocks:  # noqa: SIM108 (Triton chooses between two pointers by a branch only)
        weight = weight_text
    else:
        weight = weight_visual
    rows, live = _rows(text, visual, n_text, n_visual, row_block, text_blocks, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    inputs = x + rows[:, None] * x_stride + depth[None, :]
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if DESCRIPTORS:
        # What lies outside of [N, K] is read as zero.
        weights = tl.make_tensor_descriptor(weight, shape=[N, K], strides=[K, 1], block_shape=[BLOCK_N, BLOCK_K])
    else:
        offsets = columns.to(tl.int64)[:, None] * K + depth[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + depth < K
        block = tl.load(inputs + k) if K % BLOCK_K == 0 else tl.load(inputs + k, mask=inside[None, :], other=0.0)
        if DESCRIPTORS:
            w = weights.load([column_block * BLOCK_N, k])
        else:
            w = tl.load(weight + offsets + k, mask=(columns < N)[:, None] & inside[None, :], other=0.0)
        # Without "ieee" products of float32 are rounded to TensorFloat-32.
        total = tl.dot(_operand(block), _operand(w).T, total, input_precision="ieee")
    _store(out, total, rows, live, column_block, N, BLOCK_N)


@triton.jit(do_not_specialize=_VARYING)
def _swiglu_kernel(
    x,
    gate_text,
    up_text,
    gate_visual,
    up_visual,
    out,
    text,
    visual,
    n_text,
    n_visual,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, column_block, text_blocks = _tile(n_text, n_visual, N, BLOCK_M, BLOCK_N, GROUP)
    if row_block < text_blocks:
        gate = gate_text
        up = up_text
    else:
        gate = gate_visual
        up = up_visual
    rows, live = _rows(text, visual, n_text, n_visual, row_block, text_blocks, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    inputs = x + rows[:, None] * x_stride + depth[None, :]
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if DESCRIPTORS:
        gates = tl.make_tensor_descriptor(gate, shape=[N, K], strides=[K, 1], block_shape=[BLOCK_N, BLOCK_K])
        ups = tl.make_tensor_descriptor(up, shape=[N, K], strides=[K, 1], block_shape=[BLOCK_N, BLOCK_K])
    else:
        offsets = columns.to(tl.int64)[:, None] * K + depth[None, :]
    gate_total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + depth < K
        block = tl.load(inputs + k) if K % BLOCK_K == 0 else tl.load(inputs + k, mask=inside[None, :], other=0.0)
        if DESCRIPTORS:
            g = gates.load([column_block * BLOCK_N, k])
            u = ups.load([column_block * BLOCK_N, k])
        else:
            both = (columns < N)[:, None] & inside[None, :]
            g = tl.load(gate + offsets + k, mask=both, other=0.0)
            u = tl.load(up + offsets + k, mask=both, other=0.0)
        gate_total = tl.dot(_operand(block), _operand(g).T, gate_total, input_precision="ieee")
        up_total = tl.dot(_operand(block), _operand(u).T, up_total, input_precision="ieee")
    # Rounded as the plain path does: after each product, after the activation, after the multiplication.
    gated = _rounded(gate_total, out)
    gated = _rounded(gated * tl.sigmoid(gated), out)
    _store(out, gated * _rounded(up_total, out), rows, live, column_block, N, BLOCK_N)


_ran: set[tuple[Any, ...]] = set()


def choose_blocks(table: tuple[tuple[int, Blocks], ...], dtype: torch.dtype, rows: int, n: int, k: int) -> Blocks:
    """The blocks of `table` for so many rows and outputs, no larger than the sizes call for (16 at least)."""
    blocks = next(blocks for outputs, blocks in table if rows * n >= outputs)
    if dtype == torch.float32:
        blocks = FLOAT32_BLOCKS

    def fitting(block: int, size: int) -> int:
        return min(block, max(16, triton.next_power_of_2(size)))

    return blocks._replace(m=fitting(blocks.m, rows), n=fitting(blocks.n, n), k=fitting(blocks.k, k))


def linear(
    x: torch.Tensor, text: torch.Tensor, visual: torch.Tensor, weight_text: torch.Tensor, weight_visual: torch.Tensor
) -> torch.Tensor:
    """[N, H] -> [N, I]; text and visual are the rows of each expert, int32 or int64, together every row once."""
    return _launch(_linear_kernel, LINEAR_BLOCKS, x, text, visual, (weight_text, weight_visual))


def swiglu(
    x: torch.Tensor,
    text: torch.Tensor,
    visual: torch.Tensor,
    of_text: tuple[torch.Tensor, torch.Tensor],
    of_visual: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """[N, H] -> [N, I] with the (gate, up) weights of each expert; rows as in `linear`."""
    return _launch(_swiglu_kernel, SWIGLU_BLOCKS, x, text, visual, (*of_text, *of_visual))


def _launch(
    kernel: Any,
    table: tuple[tuple[int, Blocks], ...],
    x: torch.Tensor,
    text: torch.Tensor,
    visual: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Raises one of `FAILURES` where the kernel cannot be built, loaded or launched."""
    n, k = weights[0].shape
    aligned = [tensor.data_ptr() % 16 == 0 for tensor in (x, *weights)]
    # A descriptor wants its first element and every row at a multiple of 16 bytes.
    descriptors = all(aligned[1:]) and k * x.element_size() % 16 == 0
    blocks = choose_blocks(table, x.dtype, x.shape[0], n, k)
    # All that Triton compiles anew for.
    built = (id(kernel), x.device, x.dtype, n, k, x.stride(0), *aligned, blocks)
    if x.is_cuda and built not in _ran and torch.cuda.is_current_stream_capturing():
        raise NotReady("its first run cannot be captured in a CUDA graph; run the model once before")
    out = x.new_empty((x.shape[0], n))
    tiles = (triton.cdiv(len(text), blocks.m) + triton.cdiv(len(visual), blocks.m)) * triton.cdiv(n, blocks.n)
    if tiles == 0:
        return out

    def run() -> None:
        triton.set_allocator(_scratch)
        kernel[(tiles,)](
            *(x, *weights, out, text, visual, len(text), len(visual), x.stride(0), n, k, descriptors),
            *(blocks.m, blocks.n, blocks.k, GROUP_M),
            num_stages=blocks.stages,
            num_warps=blocks.warps,
        )

    # A descriptor is written to memory that the kernel asks for. Who gives it is a context variable of Triton, unset in
    # every new thread: it is set for this launch in a copy of the context, and the caller's stays as it was.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        contextvars.copy_context().run(run)
    _ran.add(built)
    return out


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Bytes on the launch's device and stream; torch's are aligned to 512."""
    return torch.empty(size, device="cuda", dtype=torch.int8)
