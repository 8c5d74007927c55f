"""Routed experts: rows of text through one module, rows of visual tokens through another, in one of two ways.

plain   rows of each group are gathered, each expert computes its own, and they are written back: `dispatch`, `combine`
fused   a Triton kernel reads and writes rows where they are and computes both experts in one launch
        (`expert_kernels_mono_internvl.py`, imported when it is first used)

`text_config.expert_kernel` chooses: `plain`; `fused`, wherever it can run; `auto`, where it was measured to be faster
(docs/performance.md): bfloat16 on CUDA with compute capability 9.0 (weights come through tensor descriptors) and
`AUTO_ROWS` rows or more, without gradients. What the kernel cannot serve takes the plain path and a log line says why,
once; outside of auto's rule, and under `torch.compile` where inductor fuses around the plain path, without a word.

A plan is anything with `text` and `visual`: int64 or int32 [N - V] and [V], which together hold every row once.
Shapes: N rows, V visual rows, H inputs, I outputs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Fewer rows were not measured: 320 was, a tile and its question.
AUTO_ROWS = 256
AUTO_CAPABILITY = (9, 0)
# bfloat16 products need it; descriptors are then emulated.
_LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float32)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
# Reasons without a log line: they are how calls are, not what a user could change.
_TRACED = "the call is being compiled, exported or traced"
_GRADIENTS = "gradients are wanted, and the kernel has no backward"

Pair = tuple[nn.Module, nn.Module]


class Kernels(NamedTuple):
    """What `expert_kernels_mono_internvl.py` has."""

    linear: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    failures: tuple[type[Exception], ...]
    not_ready: type[Exception]
    interpreted: bool


# ------------------------------------------------------------------------------------------------------------- plain


def dispatch(x: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., H] -> text rows [N - V, H] and visual rows [V, H]."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.index_select(0, plan.text), rows.index_select(0, plan.visual)


def combine(text: torch.Tensor, visual: torch.Tensor, plan: Any, batch_shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `dispatch`; every row of the result is written exactly once, in place."""
    out = text.new_empty((plan.text.shape[0] + plan.visual.shape[0], *text.shape[1:]))
    out.index_copy_(0, plan.text, text).index_copy_(0, plan.visual, visual)
    return out.view(*batch_shape, *text.shape[1:])


def routed_rows(x: torch.Tensor, plan: Any, text_module: nn.Module, visual_module: nn.Module) -> torch.Tensor:
    """[B, T, ...] -> the same shape: each row through the module of its group, plainly (norms of a head)."""
    rows = x.flatten(0, 1)
    text, visual = rows.index_select(0, plan.text), rows.index_select(0, plan.visual)
    return combine(text_module(text), visual_module(visual), plan, x.shape[:2])


# ------------------------------------------------------------------------------------------------------ either of two


def routed_feed_forward(
    x: torch.Tensor, plan: Any, text_mlp: nn.Module, visual_mlp: nn.Module, choice: str = "fused"
) -> torch.Tensor:
    """Each row through the feed-forward expert of its group (paper 2410.08202, eq. 4).

    Args:
        x: [N, H] or [B, T, H].
        plan: see above.
        text_mlp: a `MonoInternVLMLP`; `visual_mlp` another of the same dimensions.
        choice: `auto`, `plain` or `fused`, see above.

    Returns:
        The same shape and dtype as x.
    """

    def fused(kernels: Kernels) -> torch.Tensor:
        rows = _as_rows(x)
        weights = [[getattr(mlp, name).weight for name in _PROJECTIONS] for mlp in (text_mlp, visual_mlp)]
        (*of_text, down_text), (*of_visual, down_visual) = weights
        hidden = kernels.swiglu(rows, plan.text, plan.visual, of_text, of_visual)
        return kernels.linear(hidden, plan.text, plan.visual, down_text, down_visual).view(x.shape)

    out = _fused(fused, x, plan, [(text_mlp, visual_mlp)], choice)
    if out is not None:
        return out
    text, visual = dispatch(x, plan)
    return combine(text_mlp(text), visual_mlp(visual), plan, x.shape[:-1])


def routed_linears(x: torch.Tensor, plan: Any, pairs: Sequence[Pair], choice: str = "fused") -> list[torch.Tensor]:
    """Each row through the linear layer of its group, for several pairs (text, visual) of layers.

    Args:
        x: [N, H] or [B, T, H].
        plan, choice: see `routed_feed_forward`.

    Returns:
        For each pair [N, I] or [B, T, I] in x's dtype.
    """

    def fused(kernels: Kernels) -> list[torch.Tensor]:
        rows = _as_rows(x)
        outs = [kernels.linear(rows, plan.text, plan.visual, t.weight, v.weight) for t, v in pairs]
        return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]

    outs = _fused(fused, x, plan, pairs, choice)
    if outs is not None:
        return outs
    text, visual = dispatch(x, plan)
    return [combine(t(text), v(visual), plan, x.shape[:-1]) for t, v in pairs]


def routed_linear(
    x: torch.Tensor, plan: Any, text_linear: nn.Module, visual_linear: nn.Module, choice: str = "fused"
) -> torch.Tensor:
    """`routed_linears` of one pair."""
    return routed_linears(x, plan, [(text_linear, visual_linear)], choice)[0]


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [N, H] with contiguous rows; a view where it can be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _fused(
    function: Callable[[Kernels], Any], x: torch.Tensor, plan: Any, pairs: Sequence[Pair], choice: str
) -> Any | None:
    """What `function` makes of the kernels, or None where the plain path has to do it."""
    # Asked first of all: neither a log line nor a launch could be traced.
    if choice == "plain" or _is_traced():
        return None
    rule = auto_refusal(x) if choice == "auto" else None
    reason = rule or next(filter(None, (kernel_refusal(x, plan, *pair) for pair in pairs)), None)
    kernels = load_kernels()
    if reason is None and isinstance(kernels, Kernels):
        try:
            return function(kernels)
        except torch.OutOfMemoryError:
            raise
        except kernels.failures as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if not isinstance(error, kernels.not_ready):
                # It would fail at every layer, and each time after having been compiled.
                _failed[x.device, x.dtype] = reason
    if rule is None and not (choice == "auto" and reason == _GRADIENTS):
        logger.warning_once(f"the fused expert kernel is not used, the plain path is: {reason}")  # type: ignore[attr-defined]
    return None


# ----------------------------------------------------------------------------------------------------------- choosing


_failed: dict[tuple[torch.device, torch.dtype], str] = {}


@functools.lru_cache(maxsize=1)
def load_kernels() -> Kernels | str:
    """The kernels, or why there are none. Imports Triton."""
    try:
        from .expert_kernels_mono_internvl import FAILURES, INTERPRETED, NotReady, linear, swiglu
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return Kernels(linear, swiglu, FAILURES, NotReady, INTERPRETED)


def auto_refusal(x: torch.Tensor) -> str | None:
    """Why the rule of `auto` leaves rows like `x` [..., H] to the plain path; None where the kernel is faster."""
    if not x.is_cuda:
        return f"the tensors are on {x.device}, and auto is for CUDA"
    if x.dtype != torch.bfloat16:
        return f"the rows are {x.dtype}, and auto is for torch.bfloat16"
    if x.numel() < AUTO_ROWS * x.shape[-1]:
        return f"there are fewer rows than {AUTO_ROWS}"
    return _below(x.device, AUTO_CAPABILITY)


def kernel_refusal(x: torch.Tensor, plan: Any, text: nn.Module, visual: nn.Module) -> str | None:
    """Why the kernel cannot serve these rows and experts, whatever was chosen; None where it can.

    Args:
        x: [..., H].
        plan: see above.
        text: a `MonoInternVLMLP` or a linear layer; `visual` the same for visual rows.
    """
    reason = (_TRACED if _is_traced() else None) or device_refusal(x.device, x.dtype) or _rows_refusal(x, plan)
    if reason is not None:
        return reason
    if not _is_swiglu(text) or not _is_swiglu(visual):
        return _linears_refusal(text, visual, x, x.shape[-1])
    for mlp in (text, visual):
        if _is_hooked(mlp):
            return "a feed-forward expert has forward hooks"
        if mlp._modules.get("output_gate") is not None:
            return "a feed-forward expert has an output gate"
        if type(mlp.act_fn) not in _SILU:
            return f"the activation is {type(mlp.act_fn).__name__}, and the kernel has SiLU alone"
    inputs = x.shape[-1]
    for name in _PROJECTIONS:
        of_text, of_visual = text._modules[name], visual._modules[name]
        reason = _linears_refusal(of_text, of_visual, x, inputs)  # type: ignore[arg-type]
        if reason is not None:
            return reason
        if name == "up_proj":
            inputs = of_text.out_features  # type: ignore[union-attr,assignment]
    return None


def device_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for this device and dtype; None where there is one. Imports Triton."""
    if dtype not in _DTYPES:
        return f"the rows are {dtype}, and the kernel is for {' and '.join(map(str, _DTYPES))}"
    kernels = load_kernels()
    if isinstance(kernels, str):
        return kernels
    if kernels.interpreted and device.type != "cpu":
        return "Triton's interpreter is on (TRITON_INTERPRET), which is for the CPU"
    if not kernels.interpreted and (device.type != "cuda" or torch.version.hip is not None):
        return f"the kernel is for CUDA, the tensors are on {device.type}"
    if device.type == "cuda" and (reason := _below(device, _LEAST_CAPABILITY)) is not None:
        return reason
    return _failed.get((device, dtype))


@functools.lru_cache
def _below(device: torch.device, least: tuple[int, int]) -> str | None:
    found = torch.cuda.get_device_capability(device)
    return None if found >= least else f"the compute capability is {found} and should be {least} or more"


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _rows_refusal(x: torch.Tensor, plan: Any) -> str | None:
    if type(x) is not torch.Tensor:
        return f"the rows are a {type(x).__name__} and no plain tensor"
    if torch.is_grad_enabled() and x.requires_grad:
        return _GRADIENTS
    if forward_ad.unpack_dual(x).tangent is not None:
        return "forward-mode derivatives are wanted"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on, which chooses dtypes by operation"
    if (len(plan.text) + len(plan.visual)) * x.shape[-1] != x.numel():
        return "the plan is not of as many rows as there are"
    for index in (plan.text, plan.visual):
        if index.device != x.device or index.dtype not in (torch.int64, torch.int32) or not index.is_contiguous():
            return "the plan is no contiguous int64 or int32 on the rows' device"
    return None


def _is_swiglu(module: nn.Module) -> bool:
    """By name and not by class: the model's file, which has the class, imports this one, and a subclass may compute
    something else."""
    return type(module).__name__ == "MonoInternVLMLP"


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: hooks, or a `forward` of its own as accelerate gives it."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def _linears_refusal(text: nn.Module, visual: nn.Module, x: torch.Tensor, inputs: int) -> str | None:
    """Both must be bare `torch.nn.Linear`: what wraps or replaces one (LoRA, quantised weights) has to be called."""
    if not type(text) is type(visual) is nn.Linear:
        other = type(visual if type(text) is nn.Linear else text)
        return f"a projection is {other.__module__}.{other.__name__} and not torch.nn.Linear"
    dtype, device, shape = x.dtype, x.device, (text.out_features, inputs)
    for module in (text, visual):
        if _is_hooked(module):
            return "a projection has forward hooks"
        # Not `module.weight`: this is asked of every layer of every prompt, and `nn.Module` finds attributes slowly.
        weight = module._parameters["weight"]
        if module._parameters["bias"] is not None:
            return "a projection has a bias"
        if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor:
            return f"a weight is a {type(weight).__name__} and no plain tensor"
        if weight.dtype != dtype or weight.device != device:
            return f"weights are {weight.dtype} on {weight.device}, the rows {dtype} on {device}"
        if weight.shape != shape:
            return "the experts' weights have not the same shape, or another than the rows ask for"
        if not weight.is_contiguous():
            return "a weight is not contiguous"
        if weight.requires_grad and torch.is_grad_enabled():
            return _GRADIENTS
    return None
