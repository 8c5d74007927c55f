"""What the two files hold, as data: every tensor with its shape, type and where its rows come from.

llama.cpp has no architecture of this model's name. Two of those it has compute the same, and each gets a file that is
exact up to rounding:

routed    architecture `llama` as a mixture of two experts, the text FFN and the visual one, of which one is used. The
          router must know the modality, and all it sees is the hidden state, so the state gets one channel more that
          says it: `MODALITY` in every row of the token embedding, `-MODALITY` in every visual token. No layer writes to
          it, and only the router reads it. (Channels are added in groups of `GROUP`, so that rows stay whole blocks of
          quantised types.) An RMSNorm over n + g channels is that over n, once its weight is multiplied by
          sqrt(n / (n + g)) and its epsilon by n / (n + g).
cogvlm    with visual attention experts (1.5): a text and a visual copy of attention and feed-forward in each layer, by
          whether a batch holds ids or embeddings. It has as many key heads as query heads and one matrix for q, k and
          v, and rotates with theta 10000 whatever the file says.

The visual embedding is the projector `internvl` with no layers in front of it: patches, positions, 2 x 2 neighbours
joined, LayerNorm, linear, GELU, linear.

Shapes are torch's: [rows, columns], which GGUF lists the other way round. H hidden, D head_dim, C vision channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch.nn import functional as F

from ..configuration_mono_internvl import MonoInternVLConfig
from ..conversion.plan import EMBEDDING, HEAD, Output, Plan, head_layout, plan_native, produce
from ..conversion.source import Checkpoint
from ..rope_mono_internvl import MonoInternVLRotaryEmbedding
from ..vision_mono_internvl import MonoInternVLVisionEmbeddings


# Values of a piece: 2 MB in bfloat16.
VALUES_AT_ONCE = 1 << 20
GROUP = 32
# So small that it adds nothing to a norm (1e-6 of the squares of 2048 channels of 0.02), and exact in all types but
# the quantised ones, which keep its sign.
MODALITY = 2.0**-10
# Makes a normed +-MODALITY a clear choice however large the other channels are.
ROUTER = 2.0**20
# What ggml's plain RoPE, which `cogvlm` calls, rotates with.
COGVLM_THETA = 10_000.0
_DECODER = "model.language_model."
_F32 = GGMLQuantizationType.F32
# What llama.cpp keeps the first and the last matrix in where the others have fewer bits.
_FEW_BITS = tuple(getattr(GGMLQuantizationType, name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"))

# Consecutive parts of a tensor, of any number of rows and any float dtype.
Rows = Iterator[torch.Tensor]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. `rows()` gives its values as consecutive rows [n, shape[-1]] (a vector: as parts of it)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    rows: Callable[[], Rows]

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return torch.Size(self.shape).numel() // block * size


class Weights:
    """A checkpoint of any layout under our names, a piece at a time.

    Raises:
        ValueError: its tensors are not those of `config`; names them.
    """

    def __init__(self, checkpoint: Checkpoint, layout: str, config: MonoInternVLConfig):
        self._checkpoint = checkpoint
        self._outputs: dict[str, Output] = {
            output.name: output for output in plan_native(config, checkpoint, layout).outputs
        }
        self._plan = Plan((), head_layout(config))

    def __contains__(self, name: str) -> bool:
        return name in self._outputs

    def shape(self, name: str) -> tuple[int, ...]:
        return self._outputs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._outputs[name].dtype

    def pieces(self, name: str) -> Rows:
        """Small ones: what is done with them then happens in a core's cache, and no new memory is asked for."""
        for piece in produce(self._outputs[name], self._plan, self._checkpoint):
            yield from piece.split(max(VALUES_AT_ONCE // max(piece[0].numel(), 1), 1))

    def read(self, name: str) -> torch.Tensor:
        return torch.cat(list(self.pieces(name)))


# ------------------------------------------------------------------------------------------------------------ the model


def hidden_channels(config: MonoInternVLConfig) -> int:
    """Width of the hidden state in the file."""
    hidden = config.text_config.hidden_size
    return hidden if architecture(config) == "cogvlm" else hidden + GROUP - hidden % GROUP


def architecture(config: MonoInternVLConfig) -> str:
    """llama.cpp's name of the graph that computes the decoder."""
    return "llama" if config.visual_attention_experts == "none" else "cogvlm"


def text_tensors(config: MonoInternVLConfig, weights: Weights, kind: GGMLQuantizationType) -> list[GgufTensor]:
    """The decoder with its matrices in `kind`."""
    build = _Routed if architecture(config) == "llama" else _CogVLM
    return build(config, weights, kind).tensors()


class _Decoder:
    """What both architectures share. A layer's tensors are called `blk.N.` in the file."""

    def __init__(self, config: MonoInternVLConfig, weights: Weights, kind: GGMLQuantizationType):
        self.text, self.weights, self.kind = config.text_config, weights, kind
        self.channels = hidden_channels(config)
        # Projections of attention that visual tokens have of their own.
        self.visual_parts = str(config.visual_attention_experts).replace("none", "")
        self.made: list[GgufTensor] = []

    def add(
        self, name: str, shape: tuple[int, ...], rows: Callable[[], Rows], kind: GGMLQuantizationType | None = None
    ) -> None:
        kind = kind if kind is not None else self.kind if len(shape) > 1 else _F32
        self.made.append(GgufTensor(name, shape, kind, rows))

    def tensors(self) -> list[GgufTensor]:
        ends = GGMLQuantizationType.Q8_0 if self.kind in _FEW_BITS else self.kind
        vocabulary = self.text.vocab_size
        self.add("token_embd.weight", (vocabulary, self.channels), self.embedding, ends)
        if HEAD in self.weights:
            self.add("output.weight", (vocabulary, self.channels), partial(self.wide, HEAD), ends)
        self.norm("output_norm.weight", f"{_DECODER}norm.weight")
        self.rope()
        for i in range(self.text.num_hidden_layers):
            self.layer(f"blk.{i}.", f"{_DECODER}layers.{i}.")
        return self.made

    def embedding(self) -> Rows:
        return self.weights.pieces(EMBEDDING)

    def wide(self, name: str) -> Rows:
        """A matrix that reads the hidden state."""
        return self.weights.pieces(name)

    def tall(self, name: str) -> Rows:
        """A matrix that writes to the hidden state."""
        return self.weights.pieces(name)

    def norm(self, name: str, native: str, modality: float = 0.0) -> None:
        self.add(name, (self.channels,), partial(self.weights.pieces, native))

    def rope(self) -> None:
        """Frequencies that no theta gives."""

    def layer(self, to: str, of: str) -> None:
        raise NotImplementedError


class _Routed(_Decoder):
    """`llama` with two experts and the modality in a channel behind the hidden state's."""

    def __init__(self, config: MonoInternVLConfig, weights: Weights, kind: GGMLQuantizationType):
        super().__init__(config, weights, kind)
        self.hidden = self.text.hidden_size
        self.rotary = MonoInternVLRotaryEmbedding(self.text)

    def embedding(self) -> Rows:
        for piece in self.weights.pieces(EMBEDDING):
            yield self._widened(piece, MODALITY)

    def wide(self, name: str) -> Rows:
        for piece in self.weights.pieces(name):
            yield self._widened(piece)

    def tall(self, name: str) -> Rows:
        yield from self.weights.pieces(name)
        shape = (self.channels - self.hidden, *self.weights.shape(name)[1:])
        yield torch.zeros(shape, dtype=self.weights.dtype(name))

    def norm(self, name: str, native: str, modality: float = 0.0) -> None:
        def rows() -> Rows:
            weight = self.weights.read(native).float() * (self.hidden / self.channels) ** 0.5
            yield self._widened(weight, modality)

        self.add(name, (self.channels,), rows)

    def _widened(self, x: torch.Tensor, modality: float = 0.0) -> torch.Tensor:
        """[.., H] -> [.., channels]."""
        wide = F.pad(x, (0, self.channels - self.hidden))
        wide[..., self.hidden] = modality
        return wide

    def rope(self) -> None:
        """llama.cpp divides theta's frequencies by these. (Dynamic NTK is plain within the context that is written.)"""
        plain = 1.0 / (self.rotary.theta ** self.rotary.exponents())
        factors = plain / self.rotary.inv_freq
        if not bool((factors == 1).all()):
            self.add("rope_freqs.weight", tuple(factors.shape), lambda: iter([factors]))

    def rotated(self, name: str, heads: int, scale: float = 1.0) -> Rows:
        """Rows of a head in pairs: `llama` turns (2i, 2i + 1), where we turn (i, i + D / 2)."""
        x = self.weights.read(name)
        x = x.view(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
        x = x if scale == 1 else x.float() * scale
        yield x if x.ndim == 1 else self._widened(x)

    def layer(self, to: str, of: str) -> None:
        text, attention = self.text, f"{of}self_attn."
        width, kv_width = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        # yarn multiplies cos and sin of q and of k.
        scale = self.rotary.attention_scaling**2
        self.norm(f"{to}attn_norm.weight", f"{of}input_layernorm.weight")
        for part, rows, heads, factor in (
            ("q", width, text.num_attention_heads, scale),
            ("k", kv_width, text.num_key_value_heads, 1.0),
        ):
            for end, shape in (("weight", (rows, self.channels)), ("bias", (rows,))):
                name = f"{attention}{part}_proj.{end}"
                if name in self.weights:
                    self.add(f"{to}attn_{part}.{end}", shape, partial(self.rotated, name, heads, factor))
        self.add(f"{to}attn_v.weight", (kv_width, self.channels), partial(self.wide, f"{attention}v_proj.weight"))
        self.add(f"{to}attn_output.weight", (self.channels, width), partial(self.tall, f"{attention}o_proj.weight"))
        if f"{attention}v_proj.bias" in self.weights:
            self.add(f"{to}attn_v.bias", (kv_width,), partial(self.weights.pieces, f"{attention}v_proj.bias"))
            self.add(f"{to}attn_output.bias", (self.channels,), partial(self.tall, f"{attention}o_proj.bias"))
        self.norm(f"{to}ffn_norm.weight", f"{of}post_attention_layernorm.weight", modality=1.0)
        self.add(f"{to}ffn_gate_inp.weight", (2, self.channels), self.router, _F32)
        inner, outer = (2, text.intermediate_size, self.channels), (2, self.channels, text.intermediate_size)
        for part, sizes, rows_of in (("gate", inner, self.wide), ("up", inner, self.wide), ("down", outer, self.tall)):
            self.add(f"{to}ffn_{part}_exps.weight", sizes, partial(self.experts_of, of, part, rows_of))

    def experts_of(self, of: str, part: str, rows_of: Callable[[str], Rows]) -> Rows:
        for expert in ("mlp", "visual_mlp"):
            yield from rows_of(f"{of}{expert}.{part}_proj.weight")

    def router(self) -> Rows:
        rows = torch.zeros(2, self.channels)
        rows[0, self.hidden], rows[1, self.hidden] = ROUTER, -ROUTER
        yield rows


class _CogVLM(_Decoder):
    """A text and a visual copy of all projections; what the model has once is written twice."""

    def layer(self, to: str, of: str) -> None:
        text, attention = self.text, f"{of}self_attn."
        width = text.num_attention_heads * text.head_dim
        self.norm(f"{to}attn_norm.weight", f"{of}input_layernorm.weight")
        for prefix, visual in (("attn", ""), ("vis_attn", "visual_")):
            own = [f"{attention}{visual if part in self.visual_parts else ''}{part}_proj.weight" for part in "qkvo"]
            self.add(f"{to}{prefix}_qkv.weight", (3 * width, text.hidden_size), partial(self.joined, own))
            self.add(f"{to}{prefix}_output.weight", (text.hidden_size, width), partial(self.weights.pieces, own[3]))
        self.norm(f"{to}ffn_norm.weight", f"{of}post_attention_layernorm.weight")
        ffn = text.intermediate_size
        for prefix, expert in (("ffn", "mlp"), ("vis", "visual_mlp")):
            for part, shape in (("gate", (ffn, text.hidden_size)), ("up", (ffn, text.hidden_size))):
                name = f"{of}{expert}.{part}_proj.weight"
                self.add(f"{to}{prefix}_{part}.weight", shape, partial(self.weights.pieces, name))
            name = f"{of}{expert}.down_proj.weight"
            self.add(f"{to}{prefix}_down.weight", (text.hidden_size, ffn), partial(self.weights.pieces, name))

    def joined(self, names: list[str]) -> Rows:
        """q, k and v in one, with a key and a value head for every query head."""
        text = self.text
        yield self.weights.read(names[0])
        for name in names[1:3]:
            x = self.weights.read(name).view(text.num_key_value_heads, text.head_dim, -1)
            groups = text.num_attention_heads // text.num_key_value_heads
            yield x.repeat_interleave(groups, dim=0).flatten(0, 1)


# ------------------------------------------------------------------------------------------------- the visual embedding


def vision_tensors(config: MonoInternVLConfig, weights: Weights, tile_size: int) -> list[GgufTensor]:
    """Patches, positions and projector in float32: 1 % of the bytes, and every visual token passes through them."""
    text, vision, channels = config.text_config, config.vision_config, hidden_channels(config)
    embeddings, projector = "model.vision_embeddings.", "model.multi_modal_projector."
    side = tile_size // vision.patch_size
    width, patches = 4 * vision.hidden_size, f"{embeddings}patch_embedding.weight"

    def class_token() -> Rows:
        yield weights.read(f"{embeddings}class_embedding").flatten()

    def positions() -> Rows:
        """As the model has them at this tile size, the unused class token's last."""
        module = MonoInternVLVisionEmbeddings(vision)
        table = weights.read(f"{embeddings}position_embedding")
        module.position_embedding = torch.nn.Parameter(table)
        with torch.no_grad():
            yield module.positions(side).float()
        yield table[0, :1]

    def lengthened(name: str, modality: float = 0.0) -> Callable[[], Rows]:
        """Rows of the last linear for the channels behind the hidden state's, of which the first is the modality."""

        def rows() -> Rows:
            yield from weights.pieces(name)
            if channels > text.hidden_size:
                more = torch.zeros(channels - text.hidden_size, *weights.shape(name)[1:])
                more[0] = modality
                yield more

        return rows

    hidden = text.hidden_size
    table: list[tuple[str, tuple[int, ...], Callable[[], Rows]]] = [
        ("v.class_embd", (vision.hidden_size,), class_token),
        ("v.patch_embd.weight", weights.shape(patches), partial(weights.pieces, patches)),
        ("v.patch_embd.bias", (vision.hidden_size,), partial(weights.pieces, f"{embeddings}patch_embedding.bias")),
        ("v.position_embd.weight", (side**2 + 1, vision.hidden_size), positions),
        ("mm.model.mlp.0.weight", (width,), partial(weights.pieces, f"{projector}layer_norm.weight")),
        ("mm.model.mlp.0.bias", (width,), partial(weights.pieces, f"{projector}layer_norm.bias")),
        ("mm.model.mlp.1.weight", (hidden, width), partial(weights.pieces, f"{projector}linear_1.weight")),
        ("mm.model.mlp.1.bias", (hidden,), partial(weights.pieces, f"{projector}linear_1.bias")),
        ("mm.model.mlp.3.weight", (channels, hidden), lengthened(f"{projector}linear_2.weight")),
        ("mm.model.mlp.3.bias", (channels,), lengthened(f"{projector}linear_2.bias", -MODALITY)),
    ]
    return [GgufTensor(name, shape, _F32, rows) for name, shape, rows in table]
