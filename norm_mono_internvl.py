"""The norm of every layer, in one operation; and those of each head's q and k, which Qwen3 has (`qk_norm`)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import use_kernel_forward_from_hub

from .configuration_mono_internvl import MonoInternVLTextConfig
from .experts_mono_internvl import routed_rows


@use_kernel_forward_from_hub("RMSNorm")
class MonoInternVLRMSNorm(nn.Module):
    """RMSNorm in float32, cast back, then weighted; `from_pretrained(use_kernels=True)` may replace its forward."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)


def add_head_norms(attention: nn.Module, config: MonoInternVLTextConfig) -> None:
    """Give an attention layer `q_norm` and `k_norm` if its configuration has `qk_norm`, and, beside visual q and k
    projections, `visual_q_norm` and `visual_k_norm`."""
    experts = ("",) if config.visual_attention_experts == "none" else ("", "visual_")
    for name in [f"{expert}{x}_norm" for expert in experts for x in "qk"] if config.qk_norm else []:
        setattr(attention, name, MonoInternVLRMSNorm(config.head_dim, config.rms_norm_eps))


def normalise_heads(attention: nn.Module, x: torch.Tensor, which: str, routing: Any | None) -> torch.Tensor:
    """q or k (`which`) of each head, [B, T, heads, D], by the norms of `add_head_norms`; as it is where there are none.

    `routing`: the plan of these tokens, if some are visual; they have norms of their own where they have projections.
    """
    norm = getattr(attention, f"{which}_norm", None)
    if norm is None:
        return x
    visual_norm = getattr(attention, f"visual_{which}_norm", None)
    return norm(x) if routing is None or visual_norm is None else routed_rows(x, routing, norm, visual_norm)
