"""Mono-InternVL in vLLM: its attention, its fused experts, and one expert per token.

Which tokens are visual follows from their ids, which vLLM passes beside the embeddings of each step
(`requires_raw_input_tokens`): right for chunked prefill, prefix caching and any mix of requests in a batch, and static
in shape, so that it survives compilation and CUDA graphs. The two feed-forward experts of a layer are one fused-MoE
layer whose router is that fact. The visual attention projections of 1.5 are grouped matrix products over rows sorted
by modality.

Shapes: N tokens of a step, H hidden, V visual tokens; E = 2 experts, text first.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ..configuration_mono_internvl import MonoInternVLConfig, MonoInternVLTextConfig
from ..vision_mono_internvl import MonoInternVLMultiModalProjector, MonoInternVLVisionEmbeddings
from .checkpoint import native_weights
from .vllm_input import PLACEHOLDER, LargestInputs, PictureInfo, PictureProcessor


class Routing(NamedTuple):
    """Which expert each token of a step goes to.

    Attributes:
        logits: float [N, 2], the larger one is the token's expert.
        visual: bool [N].
        order: int64 [N], rows sorted: text, then visual.
        ends: int32 [2], where each expert's rows end in that order.
    """

    logits: torch.Tensor
    visual: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor


def route(input_ids: torch.Tensor, image_token_id: int, dtype: torch.dtype) -> Routing:
    """int64 [N] -> the routing of a step; no shape depends on data and the device is not waited for."""
    visual = input_ids == image_token_id
    return Routing(
        logits=torch.stack([~visual, visual], dim=-1).to(dtype),
        visual=visual,
        order=torch.argsort(visual.to(torch.int8), stable=True),
        ends=torch.stack([(~visual).sum(), torch.full_like(visual, True).sum()]).to(torch.int32),
    )


@torch.library.custom_op("mono_internvl::multiply_by_expert", mutates_args=())
def multiply_by_expert(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[N, in] sorted by expert, [2, out, in], int32 [2] where each expert's rows end -> [N, out].

    An operator of its own because compilation (torch 2.13) takes a bare `grouped_mm` in bfloat16 only.
    """
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


@multiply_by_expert.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


class RoutedLinear(nn.Module):
    """A projection with a text and a visual matrix; a row is multiplied by one of them. Unquantised.

    Args:
        shards: for each part of the output (q, k, v, or o alone) its size and into how many pieces the tensor-parallel
            ranks cut it; ranks beyond that share a piece, as key heads do that are fewer than ranks.
        split_inputs: cut the input instead and sum over the ranks (the output projection).
    """

    def __init__(
        self, inputs: int, shards: dict[str, tuple[int, int]], *, bias: bool = False, split_inputs: bool = False
    ):
        super().__init__()
        self.ranks, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.shards, self.split_inputs = shards, split_inputs
        sizes = [size if split_inputs else size // pieces for size, pieces in shards.values()]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.rows = {part: slice(a, a + n) for part, a, n in zip(shards, starts, sizes, strict=True)}
        self.weight = nn.Parameter(torch.empty(2, sum(sizes), inputs // self.ranks if split_inputs else inputs))
        self.bias = nn.Parameter(torch.empty(2, sum(sizes))) if bias else None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """Names are `<expert>.<part>.<weight | bias>`, tensors the whole, uncut ones."""
        for name, tensor in weights:
            expert, part, kind = name.split(".")
            pieces = self.shards[part][1]
            if not self.split_inputs:
                tensor = tensor.chunk(pieces)[self.rank * pieces // self.ranks]
            elif kind == "weight":
                tensor = tensor.chunk(self.ranks, dim=1)[self.rank]
            getattr(self, kind).data[int(expert), self.rows[part]].copy_(tensor)
            yield kind

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[N, in] -> [N, out]."""
        y = multiply_by_expert(x[routing.order], self.weight, routing.ends)
        y = torch.empty_like(y).index_copy(0, routing.order, y)
        if self.split_inputs and self.ranks > 1:
            y = tensor_model_parallel_all_reduce(y)
        return y if self.bias is None else y + self.bias[routing.visual.long()]


class Attention(LlamaAttention):
    """vLLM's attention; with visual attention experts, visual tokens are projected by their own matrices."""

    def __init__(self, config: MonoInternVLTextConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            bias=config.attention_bias,
            bias_o_proj=config.attention_bias,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        ranks = get_tensor_model_parallel_world_size()
        width, kv_width = self.total_num_heads * self.head_dim, self.total_num_kv_heads * self.head_dim
        kv_pieces = min(ranks, self.total_num_kv_heads)
        if config.visual_attention_experts in ("qkv", "qkvo"):
            shards = {"q": (width, ranks), "k": (kv_width, kv_pieces), "v": (kv_width, kv_pieces)}
            self.qkv_proj = RoutedLinear(config.hidden_size, shards, bias=config.attention_bias)
        if config.visual_attention_experts == "qkvo":
            shards = {"o": (config.hidden_size, 1)}
            self.o_proj = RoutedLinear(width, shards, bias=config.attention_bias, split_inputs=True)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:  # type: ignore[override]
        qkv = self._project(self.qkv_proj, hidden_states, routing)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        return self._project(self.o_proj, self.attn(q, k, v), routing)

    @staticmethod
    def _project(linear: nn.Module, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return linear(x, routing) if isinstance(linear, RoutedLinear) else linear(x)[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: MonoInternVLTextConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.self_attn = Attention(config, vllm_config, prefix=f"{prefix}.self_attn")
        self.experts = FusedMoEFactory(
            num_experts=2,
            top_k=1,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=True,  # the one chosen expert has weight 1
            quant_config=vllm_config.quant_config,
            activation=config.hidden_act,
            prefix=f"{prefix}.experts",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, H] and the residual stream -> the same of the next layer."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions, x, routing)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.experts(x, routing.logits), residual


@support_torch_compile
class Decoder(nn.Module):
    """ids, positions, embeddings -> hidden states; the part that vLLM compiles."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config: MonoInternVLConfig = vllm_config.model_config.hf_config
        config = model_config.text_config
        self.image_token_id = model_config.image_token_id
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, vllm_config, prefix=f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """int64 [N], int64 [N], float [N, H] -> [N, H]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        routing = route(input_ids, self.image_token_id, x.dtype)
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual, routing)
        return self.norm(x, residual)[0]


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=PictureInfo, dummy_inputs=LargestInputs)
class MonoInternVLForServing(nn.Module, SupportsMultiModal):
    """The model as vLLM runs it: the visual embedding is ours, the decoder is made of vLLM's layers."""

    requires_raw_input_tokens = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config: MonoInternVLConfig = vllm_config.model_config.hf_config
        text = self.config.text_config
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision_embeddings = MonoInternVLVisionEmbeddings(self.config.vision_config)
            self.multi_modal_projector = MonoInternVLMultiModalProjector(self.config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = Decoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model"))
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if text.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.language_model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size)
        self.register_buffer("never_generated", torch.tensor(self.config.image_token_ids), persistent=False)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality != "image":
            raise ValueError(f"{modality} input is not supported; only pictures are")
        return PLACEHOLDER

    def embed_multimodal(self, **kwargs: torch.Tensor) -> MultiModalEmbeddings:
        """`pixel_values` [tiles, P, 3*28*28] of several pictures, `num_tiles` [pictures] -> [V, H] for each."""
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return []
        tiles = self.multi_modal_projector(self.vision_embeddings(pixels))
        return [picture.flatten(0, 1) for picture in tiles.split(kwargs["num_tiles"].flatten().tolist())]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[N, H] -> [N, vocabulary]; picture tokens are never generated, as in `generate`."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else logits.index_fill(-1, self.never_generated, float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """From either layout; an unknown or missing name is an error."""
        experts = self.config.visual_attention_experts or "none"
        renamed = {".mlp.": ".experts.0.", ".visual_mlp.": ".experts.1."}
        fused = {f".self_attn.{part}_proj": (".self_attn.qkv_proj", part) for part in "qkv"}
        for part in experts if experts != "none" else "":
            fused.pop(f".self_attn.{part}_proj", None)
            linear = "o_proj" if part == "o" else "qkv_proj"
            renamed[f".self_attn.{part}_proj."] = f".self_attn.{linear}.0.{part}."
            renamed[f".self_attn.visual_{part}_proj."] = f".self_attn.{linear}.1.{part}."
        mapper = WeightsMapper(orig_to_new_substr=renamed, orig_to_new_stacked=fused, orig_to_new_prefix={"model.": ""})
        return AutoWeightsLoader(self).load_weights(native_weights(weights, self.config), mapper=mapper)
