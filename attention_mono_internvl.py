"""How visual and text tokens attend to each other: kernels, masks, and which of them a call gets.

    causal prompt, no padding     sdpa's causal kernel, no mask                    `make_attention_mask`
    flex_attention                the same, in one dtype                           `flex_forward`
    padding, static cache         transformers' mask for the backend in the config
    packed samples under sdpa     each sample by itself                            `sample_sdpa_forward`
    decoding with a mask, sdpa    on a CPU the heads of a group as queries of one  `grouped_sdpa_forward`
                                  key head; on CUDA cuDNN's grouped kernel, else   `cudnn_decode_forward`
                                  two products and a softmax                       `product_decode_forward`
    anything else                 the backend in the config

Shapes: B batch, T current tokens, S all tokens incl. cache, D head_dim.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat_mono_internvl import causal_mask, is_paged


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float32; query [B, heads, T, D], key and value [B, kv_heads, S, D] -> [B, T, heads, D]."""
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def grouped_sdpa_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query per head, [B, heads, 1, D] -> [B, 1, heads, D], without copying the cache.

    The heads of a group become queries of their key head; transformers would repeat keys and values for them, because
    sdpa's own grouping does not go with a mask.
    """
    batch, heads, _, width = query.shape
    query = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, width), None


def cudnn_decode_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `grouped_sdpa_forward`, by sdpa's own grouping, which only cuDNN's kernel has together with a mask."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def product_decode_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `grouped_sdpa_forward`, written out: two products of the cache as it is and a softmax in float32."""
    batch, heads, _, width = query.shape
    query = query.reshape(batch, key.shape[1], -1, width)
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    else:
        scores = scores + attention_mask
    out = scores.softmax(-1).to(value.dtype) @ value
    return out.reshape(batch, 1, heads, width), None


def decode_attention(query: torch.Tensor) -> Callable[..., tuple[torch.Tensor, None]]:
    """The fastest kernel for one query per head with a mask, by device (docs/performance.md, "Decoding attention")."""
    if not query.is_cuda:
        return grouped_sdpa_forward
    half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    if half and width % 8 == 0 and width <= 128 and has_cudnn_attention():
        return cudnn_decode_forward
    return product_decode_forward


@torch.compiler.assume_constant_result
def has_cudnn_attention() -> bool:
    """Whether sdpa can choose cuDNN's kernel: it is there and allowed, on an Ampere card or newer."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    allowed = torch.backends.cudnn.enabled and torch.backends.cuda.cudnn_sdp_enabled()
    return allowed and torch.cuda.get_device_capability() >= (8, 0)


def sample_sdpa_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    samples: list[list[int]],
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample of packed rows, [B, heads, T, D] -> [B, T, heads, D].

    A whole mask would make a pack cost the square of its length; this costs the squares of its samples' lengths.

    Args:
        samples: for each row the lengths of its samples, which add up to T.
    """
    rows = []
    # Split, not sliced: the gradient of a split is one concatenation, that of each slice a whole tensor of zeros.
    for *row, lengths in zip(query.split(1), key.split(1), value.split(1), samples, strict=True):
        parts = zip(*(x.split(lengths, dim=2) for x in row), strict=True)
        attended = [
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in parts
        ]
        rows.append(torch.cat(attended, dim=2))
    return torch.cat(rows).transpose(1, 2), None


def flex_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' FlexAttention, [B, heads, T, D] -> [B, T, heads, D], with queries and keys in the dtype of values.

    Under autocast rotation leaves queries and keys in float32 beside bfloat16 values. sdpa casts them by itself; flex
    has one dtype for all three.
    """
    attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    return attend(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **kwargs)


def sample_lengths(position_ids: torch.Tensor) -> list[list[int]] | None:
    """int64 [B, T] -> for each row the lengths of its samples, which begin where positions do not go on by one; None
    where no row holds more than one. The host waits for the device once.
    """
    starts = (position_ids.diff(dim=-1) != 1).nonzero().tolist()
    if not starts:
        return None
    length = position_ids.shape[1]
    cuts = [[0, *(place + 1 for row, place in starts if row == number), length] for number in range(len(position_ids))]
    return [[end - start for start, end in itertools.pairwise(row)] for row in cuts]


def choose_attention(
    module: nn.Module, query: torch.Tensor, mask: torch.Tensor | None, cache: Any, samples: list[list[int]] | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None:
    """A kernel of this file for one layer's call, `(module, query, key, value, mask, *, scaling, dropout, ...) -> (out,
    weights)`, or None where the call gets the backend in the configuration.

    `module` is the attention layer, with its configuration as `config`.
    """
    if samples is not None:
        return sample_sdpa_forward
    if module.config._attn_implementation == "flex_attention":  # type: ignore[union-attr]
        return flex_forward
    decodes = query.shape[2] == 1 and not module.training and module.num_key_value_groups > 1  # type: ignore[operator]
    under_sdpa = module.config._attn_implementation == "sdpa" and not is_paged(cache)  # type: ignore[union-attr]
    if under_sdpa and decodes and mask is not None and mask.shape[1] == 1:
        return decode_attention(query)
    return None


def make_attention_mask(
    config: Any, x: torch.Tensor, attention_mask: Any, cache: Cache | None, position_ids: torch.Tensor | None
) -> Any:
    """The mask for the attention backend in `config`, or None where the causal kernel needs none.

    transformers looks for packed samples in positions and for padding in masks: each makes the host wait, and where it
    cannot look, under compile and in CUDA graphs, it makes a whole T x S mask. So a plain prompt is not asked about,
    and positions of our own, which never restart inside a row, are not shown.
    """
    empty = cache is None or (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0)
    if attention_mask is None and position_ids is None and empty and config._attn_implementation == "sdpa":
        return None
    return causal_mask(config, x, attention_mask, cache, position_ids)


def packed_samples(
    config: Any, rows: int, attention_mask: Any, cache: Any, position_ids: torch.Tensor | None
) -> list[list[int]] | None:
    """The lengths of the samples in each of `rows` packed rows, where they can be attended to one by one: under sdpa,
    by positions alone, where the host may look at them. None otherwise."""
    if attention_mask is not None or cache is not None or position_ids is None:
        return None
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if config._attn_implementation != "sdpa" or capturing or torch.compiler.is_compiling():
        return None
    return sample_lengths(position_ids.expand(rows, -1))


def last_queries(
    config: Any, mask: Any, keep: int | None, cache: Cache | None, samples: list[list[int]] | None
) -> tuple[Any, int | None]:
    """The mask of the last `keep` queries and their number, or the whole mask and None where the others are needed too:
    then all attend, and who wants few cuts the result."""
    if keep is None or samples is not None or config._attn_implementation not in ("eager", "sdpa"):
        return mask, None
    if isinstance(mask, torch.Tensor):
        return (mask[:, :, -keep:], keep) if mask.dim() == 4 else (mask, None)
    # Without a mask sdpa would align a triangle of several queries to the first keys instead of the last, and one query
    # sees every key: right only if all keys are tokens, which the empty places of a static cache are not.
    full = cache is None or isinstance(cache, DynamicCache)
    return (None, 1) if mask is None and keep == 1 and full else (mask, None)
