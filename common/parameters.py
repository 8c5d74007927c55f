"""Whose a parameter is: the parts of a model whose sizes are shown, and the groups of them that a stage trains.

visual_embedding          patch and position embedding, and the MLP behind it
visual_experts            FFN_v of every layer (paper 2410.08202, eq. 4)
expert_gates              the gates of FFN_t and FFN_v (BREEN, arXiv 2503.12446)
learnable_queries         the queries (BREEN)
visual_attention_experts  the visual projections of attention (1.5), and the norms of q and k behind them
attention                 the language model's q, k, v and o projections, and the norms of q and k
text                      everything else of the language model: FFN_t, norms, token embedding, output head
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..configuration_mono_internvl import MonoInternVLConfig
from ..modeling_mono_internvl import MonoInternVLForCausalLM


class Part(NamedTuple):
    """A part of the model, the group that it trains with, and the modules that it is made of."""

    name: str
    group: str
    modules: tuple[str, ...]


# In the order in which they are shown. A parameter belongs to the first that one of its modules is in.
PARTS = (
    Part("token embedding", "text", ("embed_tokens",)),
    Part("output head", "text", ("lm_head",)),
    Part(
        "visual attention experts",
        "visual_attention_experts",
        tuple(f"visual_{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    ),
    Part("expert gates", "expert_gates", ("output_gate",)),
    Part("learnable queries", "learnable_queries", ("learnable_queries",)),
    Part("attention", "attention", ("self_attn",)),
    Part("text FFN (T-experts)", "text", ("mlp",)),
    Part("visual FFN (V-experts)", "visual_experts", ("visual_mlp",)),
    Part("norms", "text", ("input_layernorm", "post_attention_layernorm", "norm")),
    Part("patch embedding + positions", "visual_embedding", ("vision_embeddings",)),
    Part("projector MLP", "visual_embedding", ("multi_modal_projector",)),
)
GROUPS = (
    *("visual_embedding", "visual_experts", "visual_attention_experts", "expert_gates", "learnable_queries"),
    *("attention", "text"),
)
# Not shown where the model has none.
_OPTIONAL = tuple(part.name for part in PARTS if part.group not in ("visual_embedding", "attention", "text"))
# What runs for a text token: all there is to read when an answer is decoded.
TEXT_PATH = tuple(part.name for part in PARTS if part.group in ("attention", "text"))


def part_of(name: str) -> Part:
    """The part of a parameter or module, by its dotted name (ours, or a dense Llama's; inside PEFT's wrapper too).

    Raises:
        ValueError: it belongs to no known part.
    """
    modules = set(name.split("."))
    for part in PARTS:
        if not modules.isdisjoint(part.modules):
            return part
    raise ValueError(f"the parameter {name} belongs to no known part of the model")


def group_of(name: str) -> str:
    """The group of a parameter or module; see `part_of`."""
    return part_of(name).group


def count_by_part(model: nn.Module) -> dict[str, int]:
    """Weights of a model by part, the meta device included; tied matrices count once, the unused class row too.

    Raises:
        ValueError: a parameter belongs to no part.
    """
    counts = {part.name: 0 for part in PARTS}
    class_rows = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("class_embedding")]
    for name, tensor in [*model.named_parameters(), *class_rows]:
        counts[part_of(name).name] += tensor.numel()
    return {name: count for name, count in counts.items() if count or name not in _OPTIONAL}


def build_on_meta(config: MonoInternVLConfig) -> MonoInternVLForCausalLM:
    """The module tree of a configuration, without memory for its weights."""
    config.text_config.drop_path_rate = 0.0  # a run's setting, not the model's
    with torch.device("meta"):
        return MonoInternVLForCausalLM(config)


def released_2b_config() -> MonoInternVLConfig:
    """The dimensions of OpenGVLab/Mono-InternVL-2B."""
    return MonoInternVLConfig(text_config={"num_key_value_heads": 8})
