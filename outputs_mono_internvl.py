"""What the models return beside transformers' own fields."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .compat_mono_internvl import CacheNames


@dataclass
class MonoInternVLModelOutputWithPast(CacheNames, BaseModelOutputWithPast):
    """`image_hidden_states`: float [V, H], the embedded visual tokens in the order of their placeholders;
    `image_outputs`: what `get_image_features` returned."""

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class MonoInternVLCausalLMOutputWithPast(CacheNames, CausalLMOutputWithPast):
    """`image_hidden_states`: float [V, H], the embedded visual tokens in the order of their placeholders;
    `image_outputs`: what `get_image_features` returned."""

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
