"""Learnable queries (BREEN, arXiv 2503.12446): vectors that stand in the prompt beside the visual tokens of a picture,
are routed with them, and gather what the picture holds.

A block is all queries in order: the finest grid first, row by row. In `input_ids` each query is one placeholder
(`query_token_id`), so that a block is found by its placeholders as a picture is by its own.
"""

from typing import Any

import torch
from torch import nn

from .configuration_mono_internvl import MonoInternVLConfig


class MonoInternVLLearnableQueries(nn.Module):
    """The one parameter, `weight` [num_learnable_queries, H]."""

    def __init__(self, config: MonoInternVLConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_learnable_queries, config.text_config.hidden_size))

    def forward(self, places: int) -> torch.Tensor:
        """As many blocks as `places` hold, one after the other, [places, H]; a gradient from each."""
        return self.weight.repeat(places // self.weight.shape[0], 1)


def holds_queries(input_ids: torch.Tensor | None, config: MonoInternVLConfig) -> bool:
    """Whether a call without pictures holds queries, whose pictures then lie in the cache.

    A single token is not looked at: it is a step of decoding, and a query is never generated. In a graph, where the
    host cannot ask, queries without their pictures are an assertion.
    """
    if input_ids is None or config.query_token_id is None or input_ids.shape[1] == 1:
        return False
    found = input_ids.eq(config.query_token_id)
    if torch.compiler.is_compiling() or (found.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(~found.any(), "learnable queries without their pictures: not in a compiled call")
        return False
    return bool(found.any())


def refuse_broken_blocks(broken_rows: int, config: MonoInternVLConfig) -> None:
    """
    Raises:
        ValueError: always; so many rows of a batch hold a part of a block.
    """
    raise ValueError(
        f"{broken_rows} of the rows hold a part of a block of learnable queries: their number of query placeholders "
        f"(id {config.query_token_id}) must be a multiple of {config.num_learnable_queries}"
    )


def check_same_queries(config: MonoInternVLConfig, processor: Any) -> None:
    """
    Raises:
        ValueError: a model and a processor that say different things of learnable queries; names both.
    """
    names = ("num_learnable_queries", "query_placement", "query_token_id")
    model, given = ({name: getattr(one, name, None) for name in names} for one in (config, processor))
    if config.num_learnable_queries != (given[names[0]] or 0) or (config.num_learnable_queries and model != given):
        raise ValueError(f"the model has {model}, but the processor {given}; give the model's own processor")
