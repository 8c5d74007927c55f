"""GGUF files read back, and run as llama.cpp runs them: from the tensors and keys of the files alone, in float32.

Written from what llama.cpp computes (its graphs `llama` with experts, `cogvlm`, and the projector `internvl`), not from
the exporter: nothing here knows of a channel for the modality.
"""

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch.nn import functional as F


class GgufFile:
    """Keys as Python values, tensors as float32."""

    def __init__(self, path: Path):
        reader = GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.raw = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        self.shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(dequantize(np.array(tensor.data), tensor.tensor_type).copy()).reshape(
                self.shapes[tensor.name]
            )
            for tensor in reader.tensors
        }

    def __getitem__(self, key: str):
        return self.keys[key]

    def of_model(self, key: str):
        return self.keys[f"{self.keys['general.architecture']}.{key}"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, theta: float, factors: torch.Tensor | None, *, pairs: bool) -> torch.Tensor:
    """[T, heads, D] at positions 0..T-1; `pairs`: (2i, 2i + 1) turn together, else (i, i + D / 2)."""
    length, _, dim = x.shape
    frequencies = theta ** (-torch.arange(0, dim, 2).float() / dim)
    frequencies = frequencies if factors is None else frequencies / factors
    angles = torch.arange(length).float()[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs else x.chunk(2, dim=-1)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.stack(turned, dim=-1).flatten(-2) if pairs else torch.cat(turned, dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] each, causal."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


def run_text(file: GgufFile, ids: list[int], features: torch.Tensor, image_token: int) -> torch.Tensor:
    """Logits [T, vocabulary] of ids whose image tokens are replaced by features."""
    w = file.tensors
    token_ids = torch.tensor(ids)
    visual = token_ids == image_token
    x = w["token_embd.weight"][token_ids]
    x[visual] = features
    eps = file.of_model("attention.layer_norm_rms_epsilon")
    layer = _llama_layer if file["general.architecture"] == "llama" else _cogvlm_layer
    for i in range(file.of_model("block_count")):
        x = layer(file, f"blk.{i}.", x, visual, eps)
    head = w.get("output.weight", w["token_embd.weight"])
    return rms_norm(x, w["output_norm.weight"], eps) @ head.T


def _llama_layer(file: GgufFile, at: str, x: torch.Tensor, visual: torch.Tensor, eps: float) -> torch.Tensor:
    w, dim = file.tensors, file.of_model("attention.key_length")

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.linear(y, w[f"{at}{name}.weight"], w.get(f"{at}{name}.bias"))

    normed = rms_norm(x, w[f"{at}attn_norm.weight"], eps)
    q, k, v = (linear(f"attn_{part}", normed).view(len(x), -1, dim) for part in "qkv")
    assert (q.shape[1], k.shape[1]) == (file.of_model("attention.head_count"), file.of_model("attention.head_count_kv"))
    theta, factors = file.of_model("rope.freq_base"), w.get("rope_freqs.weight")
    q, k = (rotate(part, theta, factors, pairs=True) for part in (q, k))
    x = x + linear("attn_output", attend(q, k, v))
    normed = rms_norm(x, w[f"{at}ffn_norm.weight"], eps)
    chances = (normed @ w[f"{at}ffn_gate_inp.weight"].T).softmax(-1)
    weight, chosen = chances.topk(file.of_model("expert_used_count"), dim=-1)
    assert (weight / weight.sum(-1, keepdim=True) == 1).all() and chances.shape[1] == file.of_model("expert_count")
    gate, up, down = (w[f"{at}ffn_{part}_exps.weight"][chosen[:, 0]] for part in ("gate", "up", "down"))
    y = F.silu(gate @ normed[..., None]) * (up @ normed[..., None])
    return x + (down @ y)[..., 0]


def _cogvlm_layer(file: GgufFile, at: str, x: torch.Tensor, visual: torch.Tensor, eps: float) -> torch.Tensor:
    w, heads = file.tensors, file.of_model("attention.head_count")
    assert heads == file.of_model("attention.head_count_kv")

    def by_modality(text: str, image: str, y: torch.Tensor) -> torch.Tensor:
        return torch.where(visual[:, None], y @ w[f"{at}{image}.weight"].T, y @ w[f"{at}{text}.weight"].T)

    joined = by_modality("attn_qkv", "vis_attn_qkv", rms_norm(x, w[f"{at}attn_norm.weight"], eps))
    q, k, v = (part.view(len(x), heads, -1) for part in joined.split(x.shape[1], dim=-1))
    # ggml's plain RoPE heeds no key of the file.
    q, k = (rotate(part, 10_000.0, None, pairs=False) for part in (q, k))
    x = x + by_modality("attn_output", "vis_attn_output", attend(q, k, v))
    normed = rms_norm(x, w[f"{at}ffn_norm.weight"], eps)
    y = F.silu(by_modality("ffn_gate", "vis_gate", normed)) * by_modality("ffn_up", "vis_up", normed)
    return x + by_modality("ffn_down", "vis_down", y)


def run_vision(file: GgufFile, tiles: torch.Tensor) -> torch.Tensor:
    """Normalised tiles [N, 3, S, S] -> visual tokens [N * tokens, hidden]."""
    w, side, merge = file.tensors, file["clip.vision.image_size"], file["clip.vision.projector.scale_factor"]
    patch = file["clip.vision.patch_size"]
    assert tiles.shape[-1] == side and file["clip.vision.block_count"] == 0
    x = F.conv2d(tiles, w["v.patch_embd.weight"], w["v.patch_embd.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([x, w["v.class_embd"].expand(len(x), 1, -1)], dim=1) + w["v.position_embd.weight"]
    n, rows = len(x), side // patch
    x = x[:, :-1].view(n, rows // merge, merge, rows // merge, merge, -1).transpose(2, 3)
    x = x.reshape(n * (rows // merge) ** 2, -1)
    x = F.layer_norm(x, x.shape[-1:], w["mm.model.mlp.0.weight"], w["mm.model.mlp.0.bias"], 1e-5)
    x = F.gelu(F.linear(x, w["mm.model.mlp.1.weight"], w["mm.model.mlp.1.bias"]))
    return F.linear(x, w["mm.model.mlp.3.weight"], w["mm.model.mlp.3.bias"])
