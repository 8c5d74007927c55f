"""What only training needs of the model: the loss, stochastic depth, a visual path in every graph, no cache."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .configuration_mono_internvl import MonoInternVLTextConfig, MonoInternVLVisionConfig


def next_token_loss(
    loss_function: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    placeholders: Iterable[int | None],
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> torch.Tensor:
    """Mean cross-entropy of the next token over the targets that are no placeholders.

    Collators that know nothing of visual tokens leave placeholders among the labels, and whoever counts the targets
    of a step (`num_items_in_batch`) counts them too. The count is lowered by their share in this call: exact where
    the call holds the whole step, and for several micro-batches a mean of their means by the targets counted.

    Args:
        loss_function: transformers' `ForCausalLMLoss`, or what somebody put in its place.
        logits: [B, T, vocabulary]. labels: int64 [B, T], shifted here. shift_labels: the same, shifted already.
        placeholders: the ids that visual tokens and learnable queries have in the labels.

    Raises:
        ValueError: labels and logits differ in length.
    """
    if labels is not None and labels.shape[-1] != logits.shape[-2]:
        raise ValueError(
            f"labels of {labels.shape[-1]} positions for logits of {logits.shape[-2]}: with labels, leave "
            "logits_to_keep at 0"
        )
    given = labels[..., 1:] if shift_labels is None else shift_labels  # type: ignore[index]
    visual = [token for token in placeholders if token is not None]
    unlearnt = _any_of(given, visual)
    if num_items_in_batch is not None:
        counted = (given != ignore_index).sum()
        share = (counted - unlearnt.sum()) / counted.clamp(min=1)
        num_items_in_batch = (torch.as_tensor(num_items_in_batch, device=share.device) * share).clamp(min=1e-6)
    if shift_labels is None:
        labels = labels.masked_fill(_any_of(labels, visual), ignore_index)  # type: ignore[union-attr,arg-type]
    else:
        shift_labels = shift_labels.masked_fill(unlearnt, ignore_index)
    return loss_function(
        logits=logits,
        labels=labels,
        vocab_size=logits.shape[-1],
        num_items_in_batch=num_items_in_batch,
        shift_labels=shift_labels,
        ignore_index=ignore_index,
        **kwargs,
    )


def _any_of(ids: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """Where `ids` is one of `wanted`, compared one by one: a tensor of them would have to travel to the device."""
    return functools.reduce(torch.logical_or, (ids.eq(token) for token in wanted))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): a residual branch of a whole row is left out while training.

    What is kept is divided by the share of rows kept, so that the mean stays. The numbers are made so that layers of
    different rates are one graph under `torch.compile`: a rate inside a random operation would be a constant of its
    graph, and each layer would be compiled by itself.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training:
            return x
        draws = torch.rand([x.shape[0]] + [1] * (x.dim() - 1), device=x.device)
        keep = 1.0 - self.rate
        return x * ((draws < keep) / keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def make_drop_path(config: MonoInternVLTextConfig, layer_idx: int) -> nn.Module:
    """Stochastic depth, growing linearly with depth; nothing at all where the configuration has none."""
    if config.drop_path_rate == 0:
        return nn.Identity()
    return DropPath(config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1))


def empty_tiles(config: MonoInternVLVisionConfig, device: torch.device) -> torch.Tensor:
    """Pixels of no tile, [0, P, 3*s*s]: every rank keeps the visual path in its graph, else DDP and FSDP wait for
    gradients for ever."""
    return torch.zeros(0, config.tokens_per_tile, 3 * config.token_size**2, device=device)


def refuse_cache(cache: Cache | None) -> None:
    """Layers that are computed again for their gradients would write the cache twice, so they get none.

    Raises:
        ValueError: the cache holds tokens that this call is meant to continue.
    """
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            f"gradient checkpointing cannot continue a cache of {cache.get_seq_length()} tokens: give the whole "
            "sequence, or turn it off with model.gradient_checkpointing_disable()"
        )
