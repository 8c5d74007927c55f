"""Rotary positions: RoPE with a stateless, branch-free dynamic NTK, and the rotation itself."""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_mono_internvl import MonoInternVLTextConfig, check_rope


class MonoInternVLRotaryEmbedding(nn.Module):
    """RoPE tables; dynamic NTK beyond `max_position_embeddings` without state, branches or a device sync.

    Types whose frequencies are constants (linear, llama3, yarn) take transformers' own.

    base' = theta * (f * L / max - (f - 1)) ** (D / (D - 2)), L = largest position of the call + 1, cache included.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: MonoInternVLTextConfig):
        super().__init__()
        self.config = config
        # Filled and checked by the config too, but `rope_parameters` can be assigned later.
        config.standardize_rope_params()
        self.theta = float(config.rope_parameters["rope_theta"])
        self.rope_type = check_rope(config.rope_parameters)
        self.dynamic = self.rope_type == "dynamic"
        self.factor = float(config.rope_parameters.get("factor", 1.0))
        self.attention_scaling = 1.0
        self.register_buffer("inv_freq", self.initial_inv_freq(), persistent=False)

    def exponents(self, device: torch.device | None = None) -> torch.Tensor:
        dim = self.config.head_dim
        return torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim

    def initial_inv_freq(self) -> torch.Tensor:
        if self.rope_type in ("default", "dynamic"):
            return 1.0 / (self.theta ** self.exponents())
        inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        return inv_freq

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [B, T] -> cos, sin [B, T, D] in the dtype of `x`."""
        inv_freq = self.inv_freq.float()
        if self.dynamic:
            dim, limit = self.config.head_dim, self.config.max_position_embeddings
            length = (position_ids.max() + 1).clamp(min=limit).float()
            base = self.theta * ((self.factor * length / limit) - (self.factor - 1)) ** (dim / (dim - 2))
            scaled = 1.0 / (base ** self.exponents(position_ids.device))
            inv_freq = torch.where(length > limit, scaled, inv_freq.to(position_ids.device))
        angles = position_ids[..., None].float() * inv_freq.to(position_ids.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:  # yarn's
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of [B, T, heads, D] by cos, sin [B, T, D], the first half of sin negated (`signed`).

    Heads stand behind the tokens, as a projection leaves them: on the transposed view every kernel here would be a
    strided one, which on a GPU costs a tenth of a prompt.
    """
    return torch.addcmul(x * cos.unsqueeze(2), x.roll(x.shape[-1] // 2, dims=-1), sin.unsqueeze(2))


def signed(sin: torch.Tensor) -> torch.Tensor:
    """Negate the first half once per forward: rotating needs no negation then."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)
