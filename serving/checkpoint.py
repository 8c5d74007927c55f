"""What a served folder holds: its configuration as an engine needs it, and its weights under our names.

Nothing here needs an engine. A folder is in our layout (the repository's root, or what `save_pretrained` wrote) or in
the official one (`model_type: internvl_chat`), which is read as it is.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..common.engines import refuse_additions, stop_token_ids
from ..configuration_mono_internvl import MonoInternVLConfig
from ..weight_mapping_mono_internvl import RENAMINGS, split_grouped_qkv


ARCHITECTURE = "MonoInternVLForCausalLM"
OFFICIAL_DECODER = "InternLM2VEForCausalLM"
_RENAMINGS = [(re.compile(official), ours.lstrip("^").replace("\\.", ".")) for official, ours in RENAMINGS]


def is_mono_internvl(config: dict[str, Any]) -> bool:
    """Whether a `config.json` describes this model; `internvl_chat` alone may be any InternVL."""
    if config.get("model_type") == MonoInternVLConfig.model_type:
        return True
    decoder = config.get("llm_config") or {}
    return config.get("model_type") == "internvl_chat" and OFFICIAL_DECODER in (decoder.get("architectures") or [])


def serving_config(config: dict[str, Any]) -> MonoInternVLConfig:
    """A `config.json` of either layout -> the configuration an engine is given.

    Three things are settled here. An engine finds the model by `architectures`, which an official file fills with
    another class. An official folder need not say that `<|im_end|>` ends an answer. And dynamic NTK scaling becomes
    plain RoPE, which it is up to `max_position_embeddings`: engines keep rotated keys of many requests and could not
    follow a base that grows with each, so the context ends there.

    Raises:
        ValueError: it has what the engine's model has not, such as norms of another base; named.
    """
    served = MonoInternVLConfig.from_dict({**config, "model_type": MonoInternVLConfig.model_type})
    refuse_additions(served, "the vLLM plugin")
    served.architectures = [ARCHITECTURE]
    text = served.text_config
    kind = text.rope_parameters["rope_type"]
    if kind not in ("default", "dynamic"):
        raise ValueError(f"the vLLM plugin has no place for the rope type {kind}: run this model with transformers")
    text.rope_parameters = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
    served.eos_token_id = stop_token_ids(served)
    return served


def native_weights(
    weights: Iterable[tuple[str, torch.Tensor]], config: MonoInternVLConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of either layout, one at a time, under our names; a grouped `wqkv` becomes q, k and v."""
    text = config.text_config
    for name, tensor in weights:
        for pattern, ours in _RENAMINGS:
            name = pattern.sub(ours, name)
        before, grouped, kind = name.partition(".attention.wqkv.")
        if not grouped:
            yield name, tensor
            continue
        parts = split_grouped_qkv(tensor, text.num_attention_heads, text.num_key_value_heads, text.head_dim)
        for part, rows in zip("qkv", parts, strict=True):
            yield f"{before}.self_attn.{part}_proj.{kind}", rows
