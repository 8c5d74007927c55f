"""The output head: hidden states -> logits, fast for a vocabulary of an odd size."""

import copy

import torch
from torch import nn
from torch.nn import functional as F


# Bytes from which on a row of logits begins aligned, and the number of columns that products like.
_ALIGNED_BYTES, _MULTIPLE = 16, 64
# Where each way begins to pay, in rows; measured on an H200 (docs/performance.md, "The output head").
PADDED_ROWS_TRAINED, PADDED_ROWS = 64, 2304


class MonoInternVLOutputHead(nn.Linear):
    """`nn.Linear` without bias whose products are aligned on a GPU; its one parameter is `weight` [vocabulary, H].

    The released vocabulary has 92,553 tokens. With an odd number of columns cuBLAS takes kernels without aligned loads,
    6 times slower, which is 29 % of a training step. Two ways around it, neither of which changes parameters, names,
    shapes or gradients: the weight gets rows of zeros for the length of one call, whose columns the logits leave out
    (`padded`); or the columns up to a multiple and the few after it are two products (`split`), which saves copying the
    weight but has no aligned backward.
    """

    def __init__(self, hidden_size: int, vocab_size: int, device: torch.device | str | None = None):
        super().__init__(hidden_size, vocab_size, bias=False, device=device)

    @classmethod
    def of(cls, linear: nn.Module) -> nn.Module:
        """A head of this class with all that a plain `nn.Linear` has: its weight, hooks, and marks such as the one that
        says to transformers that it is initialised. What is no plain one, or has a bias, is returned as it is."""
        if type(linear) is not nn.Linear or linear.bias is not None:
            return linear
        head = cls.__new__(cls)
        head.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(linear).items()})
        return head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., vocabulary]."""
        return self.product(x, self.way(x))

    def product(self, x: torch.Tensor, way: str) -> torch.Tensor:
        """[..., H] -> [..., vocabulary] in one of the ways that `way` names."""
        if way == "plain":
            return super().forward(x)
        size = self.weight.shape[0]
        if way == "padded":
            return F.linear(x, F.pad(self.weight, (0, 0, 0, -size % _MULTIPLE)))[..., :size]
        rest = size % _MULTIPLE
        return torch.cat([F.linear(x, part) for part in self.weight.split([size - rest, rest])], dim=-1)

    def way(self, x: torch.Tensor) -> str:
        """`plain`, `padded` or `split`: what is fastest for rows like `x` [..., H].

        A weight of another class, quantised or shared out among devices, is left to its own product.
        """
        weight = self.weight
        aligned = weight.shape[0] * weight.element_size() % _ALIGNED_BYTES == 0
        if not x.is_cuda or aligned or type(weight) not in (torch.Tensor, nn.Parameter):
            return "plain"
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return "padded" if rows >= PADDED_ROWS_TRAINED else "plain"
        return "padded" if rows >= PADDED_ROWS or weight.shape[0] < _MULTIPLE else "split"
