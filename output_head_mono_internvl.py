"""The output head: hidden states -> logits, fast for a vocabulary of an odd size."""

import torch
from torch import nn
from torch.nn import functional as F


# Bytes from which on a row of logits begins aligned; and the width to which the head is padded then, in columns.
_ALIGNED_BYTES, _MULTIPLE = 16, 64
# Below so many rows copying the weight costs more than it saves (docs/performance.md, "The output head").
MIN_ROWS = 128


class MonoInternVLOutputHead(nn.Linear):
    """`nn.Linear` without bias whose products are aligned on a GPU; its one parameter is `weight` [vocabulary, H].

    The released vocabulary has 92,553 tokens. With an odd number of columns cuBLAS takes kernels without aligned loads,
    7 times slower forward and 5 times backward, which is 29 % of a training step. So the weight gets rows of zeros for
    the length of one call, and the logits are the view without their columns: shapes, values and gradients stay.
    """

    def __init__(self, hidden_size: int, vocab_size: int, device: torch.device | str | None = None):
        super().__init__(hidden_size, vocab_size, bias=False, device=device)

    @classmethod
    def of(cls, linear: nn.Module) -> nn.Module:
        """The same weight in a head of this class; what is no plain `nn.Linear`, or has a bias, as it is."""
        if type(linear) is not nn.Linear or linear.bias is not None:
            return linear
        head = cls(linear.in_features, linear.out_features, device="meta")
        head.weight = linear.weight
        return head.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., vocabulary]."""
        if not self.pays(x):
            return super().forward(x)
        missing = -self.weight.shape[0] % _MULTIPLE
        return F.linear(x, F.pad(self.weight, (0, 0, 0, missing)))[..., : self.weight.shape[0]]

    def pays(self, x: torch.Tensor) -> bool:
        """Whether the padded product is faster: on CUDA, with unaligned columns, from `MIN_ROWS` rows on.

        A weight of another class, quantised or shared out among devices, is left to its own product.
        """
        weight = self.weight
        aligned = weight.shape[0] * weight.element_size() % _ALIGNED_BYTES == 0
        plain = type(weight) in (torch.Tensor, nn.Parameter)
        return x.is_cuda and not aligned and plain and x.numel() >= MIN_ROWS * x.shape[-1]
