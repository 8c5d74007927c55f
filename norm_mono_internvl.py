"""The norm of every layer, in one operation."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import use_kernel_forward_from_hub


@use_kernel_forward_from_hub("RMSNorm")
class MonoInternVLRMSNorm(nn.Module):
    """RMSNorm in float32, cast back, then weighted; `from_pretrained(use_kernels=True)` may replace its forward."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)
