"""Mono-InternVL: patches + ids -> logits. What differs from a plain Llama-like decoder:

1. No vision encoder. A 28 x 28 px patch is embedded linearly and is one token (`vision_mono_internvl.py`).
2. Two feed-forward experts per layer: `visual_mlp` (FFN_v) for visual tokens, `mlp` (FFN_t) for all others
   (paper 2410.08202, eq. 4). The token alone decides, in a first prompt as in a later turn on top of a cache, and every
   token passes through exactly one (`experts_mono_internvl.py`: one by one, or both in a fused kernel).
3. With `visual_attention_experts` (1.5, paper 2507.12566) visual tokens also have their own q/k/v ("qkv"), and their
   own output projection ("qkvo"). None is version 1: attention is shared.
4. One `RoutingPlan` per forward, made from the positions of the visual tokens among this call's tokens. Inference on
   text alone, and so decoding, has none: then a layer is a plain dense layer and the visual experts are not even read.
   While training, a batch without pictures has a plan without visual tokens, so that every parameter gets a gradient on
   every rank, which DDP, FSDP and ZeRO wait for.
5. A picture in a later turn is nothing special: whoever has a cache gives only new tokens and new tiles. Keys and
   values of the earlier ones, visual or not, lie in the cache, projected and rotated.
6. `keep`: the last layer computes only the last `keep` positions (`logits_to_keep`), keys and values for all, unless
   one of them is visual (or, in a compiled call with pictures, may be), hidden states or attentions are recorded, or
   the model trains.
7. With `num_learnable_queries` (BREEN, arXiv 2503.12446) a prompt with pictures also holds queries, learnt vectors that
   are routed as visual tokens are, also on top of a cache that holds their pictures (`queries_mono_internvl.py`).
8. Other bases than InternLM2 bring biases of some projections and norms of each head's queries and keys (`qk_norm`).
   Visual attention experts have biases and norms of their own.
9. RoPE with a dynamic NTK that has no state: angles depend on this call's positions alone, and keys in the cache keep
   those that they were rotated with.

Shapes: B batch, T current tokens, S all tokens incl. cache, N = B*T, H hidden, D head_dim. A picture comes as square
tiles of `side` pixels (`image_processing_mono_internvl.py` cuts it): P patches of a tile, V visual tokens of all tiles
(tiles * P), C width of a 14-px quarter of a patch, four of which are joined.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mono_internvl import (
    choose_attention,
    eager_attention_forward,
    last_queries,
    make_attention_mask,
    packed_samples,
)
from .chat_mono_internvl import AnswerStreamer, MonoInternVLChatMixin
from .compat_mono_internvl import (
    CACHE,
    cache_of,
    checked_keywords,
    cpu_has_bfloat16_units,
    one_cache,
    register_causal_lm,
    update_cache,
)
from .configuration_mono_internvl import MonoInternVLConfig, MonoInternVLTextConfig
from .experts_mono_internvl import routed_feed_forward, routed_linears
from .generation_mono_internvl import MonoInternVLGenerationMixin
from .loading_mono_internvl import SavingMixin, StrictLoadingMixin, refuse_unknown
from .norm_mono_internvl import MonoInternVLRMSNorm, add_head_norms, normalise_heads
from .output_head_mono_internvl import MonoInternVLOutputHead
from .outputs_mono_internvl import MonoInternVLCausalLMOutputWithPast, MonoInternVLModelOutputWithPast
from .prompt_mono_internvl import place_images
from .queries_mono_internvl import MonoInternVLLearnableQueries, holds_queries, refuse_broken_blocks
from .rope_mono_internvl import MonoInternVLRotaryEmbedding, rotate, signed
from .training_mono_internvl import empty_tiles, make_drop_path, next_token_loss, refuse_cache
from .vision_mono_internvl import MonoInternVLMultiModalProjector, MonoInternVLVisionEmbeddings, as_patches
from .weight_mapping_mono_internvl import register_checkpoint_mapping


register_checkpoint_mapping(MonoInternVLConfig.model_type)
register_causal_lm(MonoInternVLConfig.model_type, "MonoInternVLForCausalLM")

# Keywords, and fields of a configuration, that ask for what every layer computes.
_RECORDED = ("output_hidden_states", "output_attentions")


# --------------------------------------------------------------------------------------------------------- routing


class RoutingPlan(NamedTuple):
    """Which of the N tokens of a batch go to which expert; made once per forward, used by every layer.

    Attributes:
        text: int64 [N - V], indices of all other tokens in the flattened batch, ascending.
        visual: int64 [V], indices of visual tokens, ascending; behind them those of learnable queries, ascending.
    """

    text: torch.Tensor
    visual: torch.Tensor


def make_routing_plan(
    visual_token_mask: torch.Tensor, num_visual: int, query_mask: torch.Tensor | None = None
) -> RoutingPlan:
    """Masks bool [B, T] and the count of both, which the host knows: no shape here depends on data."""
    # False sorts before True: of the inverted mask the visual tokens come first, and a stable sort keeps their order.
    key = (~visual_token_mask).reshape(-1).to(torch.int8)
    if query_mask is not None:
        key = 2 * key - query_mask.reshape(-1).to(torch.int8)  # 0 visual tokens, 1 queries, 2 text
    order = torch.argsort(key, stable=True)
    return RoutingPlan(text=order[num_visual:], visual=order[:num_visual])


# ---------------------------------------------------------------------------------------------------------- decoder


class MonoInternVLAttention(nn.Module):
    """Grouped-query attention; with visual attention experts, visual tokens are projected by their own matrices."""

    def __init__(self, config: MonoInternVLTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim

        qkv_bias, o_bias = "q" in config.biased_projections, "o" in config.biased_projections
        self.has_visual_qkv = config.visual_attention_experts in ("qkv", "qkvo")
        self.has_visual_o = config.visual_attention_experts == "qkvo"
        self.q_proj = nn.Linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=o_bias)
        if self.has_visual_qkv:
            self.visual_q_proj = nn.Linear(config.hidden_size, width, bias=qkv_bias)
            self.visual_k_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
            self.visual_v_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
        if self.has_visual_o:
            self.visual_o_proj = nn.Linear(width, config.hidden_size, bias=o_bias)
        add_head_norms(self, config)

    def project(self, x: torch.Tensor, routing: RoutingPlan | None, queries: int | None) -> tuple[torch.Tensor, ...]:
        """[B, T, H] -> q, k, v [B, T, heads * D]; `queries`: only the last so many positions, all text, get a q."""
        if routing is None or not self.has_visual_qkv:
            return self.q_proj(x if queries is None else x[:, -queries:]), self.k_proj(x), self.v_proj(x)
        pairs = [
            (self.k_proj, self.visual_k_proj),
            (self.v_proj, self.visual_v_proj),
            (self.q_proj, self.visual_q_proj),
        ]
        if queries is None:
            k, v, q = routed_linears(x, routing, pairs, self.config.expert_kernel)
        else:
            k, v = routed_linears(x, routing, pairs[:2], self.config.expert_kernel)
            q = self.q_proj(x[:, -queries:])
        return q, k, v

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        routing: RoutingPlan | None = None,
        keep: int | None = None,
        samples: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, H] -> [B, T, H], or [B, keep, H]: the last `keep` positions; and the weights where a backend has them.

        Args:
            position_embeddings: cos, and sin with its first half negated, as `rotate` takes it; [B, T, D].
            samples: of packed rows, the lengths of each row's samples, instead of a mask.
        """
        # `keep`, or None where the backend wants all queries: then the result is cut below.
        attention_mask, queries = last_queries(self.config, attention_mask, keep, cache, samples)
        q, k, v = self.project(hidden_states, routing, queries)
        q, k, v = (x.view(*x.shape[:2], -1, self.head_dim) for x in (q, k, v))  # [B, T, heads, D]
        k, q = normalise_heads(self, k, "k", routing), normalise_heads(self, q, "q", None if queries else routing)
        cos, sin = position_embeddings
        k = rotate(k, cos, sin)
        q = rotate(q, cos, sin) if queries is None else rotate(q, cos[:, -queries:], sin[:, -queries:])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            # Continuous batching's cache reads `kwargs`, and may add to them.
            k, v = update_cache(cache, k, v, self.layer_idx, kwargs)

        dropout = self.attention_dropout if self.training else 0.0
        # transformers looks for the text of the next line in this file before it lets anyone change the backend.
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        # A kernel of ours for packed samples and for one query against a masked cache, or None.
        attend = choose_attention(self, q, attention_mask, cache, samples) or backend
        if samples is not None:
            kwargs["samples"] = samples
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*out.shape[:2], -1).contiguous()
        if keep is not None:
            out, routing = out[:, -keep:], None
        if routing is None or not self.has_visual_o:
            return self.o_proj(out), weights
        (out,) = routed_linears(out, routing, [(self.o_proj, self.visual_o_proj)], self.config.expert_kernel)
        return out, weights


class MonoInternVLMLP(nn.Module):
    """SwiGLU: down(act(gate x) * up x); with `expert_gates` times sigmoid(output_gate x)."""

    def __init__(self, config: MonoInternVLTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.output_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.expert_gates else None
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        # In place where no backward needs the gate.
        out = self.down_proj(gate * up if torch.is_grad_enabled() else gate.mul_(up))
        return out if self.output_gate is None else out * self.output_gate(x).sigmoid()


class MonoInternVLDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MonoInternVLTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = MonoInternVLAttention(config, layer_idx)
        self.mlp = MonoInternVLMLP(config)
        self.visual_mlp = MonoInternVLMLP(config)
        self.input_layernorm = MonoInternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MonoInternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.drop_path = make_drop_path(config, layer_idx)

    def feed_forward(self, x: torch.Tensor, routing: RoutingPlan | None) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]: each token through its own expert."""
        if routing is None:
            return self.mlp(x)
        return routed_feed_forward(x, routing, self.mlp, self.visual_mlp, self.config.expert_kernel)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        routing: RoutingPlan | None = None,
        keep: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, T, H] -> [B, T, H], or [B, keep, H]: the last `keep` positions, which must be text if there is a plan."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            routing=routing,
            keep=keep,
            **kwargs,
        )
        if keep is not None:
            hidden_states, routing = hidden_states[:, -keep:], None
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.feed_forward(self.post_attention_layernorm(hidden_states), routing))


# ----------------------------------------------------------------------------------------------------------- models


class MonoInternVLPreTrainedModel(SavingMixin, PreTrainedModel):
    config: MonoInternVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MonoInternVLDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MonoInternVLVisionEmbeddings):
            init.normal_(module.position_embedding, mean=0.0, std=module.config.initializer_range)
            init.zeros_(module.class_embedding)
            # Buffers that no file holds are empty after a load through the meta device, so they are set here.
            init.copy_(module.pixel_mean, torch.tensor(module.config.image_mean, dtype=torch.float32))
            init.copy_(module.pixel_std, torch.tensor(module.config.image_std, dtype=torch.float32))
        elif isinstance(module, MonoInternVLLearnableQueries):
            init.normal_(module.weight, mean=0.0, std=module.config.text_config.initializer_range)
        elif isinstance(module, MonoInternVLRotaryEmbedding):
            init.copy_(module.inv_freq, module.initial_inv_freq())


class MonoInternVLTextModel(MonoInternVLPreTrainedModel):
    """The decoder: ids or embeddings -> hidden states; it knows visual tokens only through a `RoutingPlan`."""

    config: MonoInternVLTextConfig  # type: ignore[assignment]
    input_modalities = ("text",)  # type: ignore[assignment]
    _can_record_outputs = {"hidden_states": MonoInternVLDecoderLayer, "attentions": MonoInternVLAttention}

    def __init__(self, config: MonoInternVLTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MonoInternVLDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MonoInternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MonoInternVLRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @checked_keywords
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routing: RoutingPlan | None = None,
        keep: int | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As a core decoder's, with `routing`: the plan of these tokens, and `keep`: the last layer computes only the
        last so many positions of each sequence, which must be text if there is a plan."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = one_cache(cache, past_key_values)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            refuse_cache(cache)
            cache, use_cache = None, False
        # Samples packed into one row show only in positions that the caller gives, which begin anew; the default, made
        # below, never does.
        samples = packed_samples(self.config, inputs_embeds.shape[0], attention_mask, cache, position_ids)
        mask = None
        if samples is None:
            mask = make_attention_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if use_cache and cache is None:
            # Not before: with a cache, and be it empty, transformers does not look for packed samples.
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        x = inputs_embeds
        cos, sin = self.rotary_emb(x, position_ids)
        position_embeddings = cos, signed(sin)
        if keep is not None and keep >= x.shape[1]:
            keep = None  # so in every step of decoding: one token in, one kept
        for index, layer in enumerate(self.layers, 1):
            x = layer(
                x,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                routing=routing,
                keep=keep if index == len(self.layers) else None,
                samples=samples,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})


class MonoInternVLModel(MonoInternVLPreTrainedModel):
    """Visual embedding + decoder, without the output head."""

    def __init__(self, config: MonoInternVLConfig):
        super().__init__(config)
        if config.image_token_id >= config.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={config.image_token_id} is outside the vocabulary of {config.text_config.vocab_size}; "
                "pass image_token_id=<id of <IMG_CONTEXT>> to from_pretrained or set it in the config"
            )
        self.vision_embeddings = MonoInternVLVisionEmbeddings(config.vision_config)
        self.multi_modal_projector = MonoInternVLMultiModalProjector(config)
        self.language_model = MonoInternVLTextModel(config.text_config)
        self.learnable_queries = MonoInternVLLearnableQueries(config) if config.num_learnable_queries else None
        self.post_init()

    @checked_keywords
    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed tiles.

        Args:
            pixel_values: [tiles, P, 3*28*28] or [tiles, 3, side, side]; float (normalised) or uint8 (normalised here).

        Returns:
            `last_hidden_state` [tiles, P, 4 * C] before and `pooler_output` [tiles, P, H] after the projector.
        """
        embedded = self.vision_embeddings(as_patches(pixel_values))
        return BaseModelOutputWithPooling(
            last_hidden_state=embedded, pooler_output=self.multi_modal_projector(embedded)
        )

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_id: int | None = None
    ) -> torch.Tensor:
        """bool [B, T]: where placeholders are (of visual tokens, or `token_id`); without ids, where an embedding equals
        the placeholder's."""
        token_id = self.config.image_token_id if token_id is None else token_id
        if input_ids is not None:
            return input_ids == token_id
        assert inputs_embeds is not None
        token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _image_outputs(
        self,
        pixel_values: torch.Tensor | None,
        mm_encoder_outputs: dict | None,
        visual_token_mask: torch.Tensor | None,
        device: torch.device,
    ) -> BaseModelOutputWithPooling | None:
        """The embedded tiles of this call, or None when it has no picture. While training [0, P, H] and not None (why:
        point 4 above), unless a mask says that `inputs_embeds` holds visual tokens already."""
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            return mm_encoder_outputs["image"]
        if pixel_values is None and visual_token_mask is None and self.training and torch.is_grad_enabled():
            pixel_values = empty_tiles(self.config.vision_config, device)
        return None if pixel_values is None else self.get_image_features(pixel_values, return_dict=True)

    def _visual_embeds(
        self, image_outputs: BaseModelOutputWithPooling | None, input_ids: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Visual tokens of embedded tiles, [V, H]; [0, H] where there are none but `input_ids` hold queries of pictures
        in the cache."""
        if image_outputs is None:
            return self.learnable_queries(0) if holds_queries(input_ids, self.config) else None  # type: ignore[misc]
        pooled: Any = image_outputs.pooler_output
        tensors = [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def _route(
        self,
        visual_mask: torch.Tensor,
        visual_embeds: torch.Tensor | None,
        keep: int | None,
        query_mask: torch.Tensor | None,
    ) -> tuple[RoutingPlan | None, int | None]:
        """The plan for this forward; and `keep`, or None where one of the last `keep` positions is visual or a query
        or, in a graph, may be.

        Args:
            visual_mask: bool [B, T]. visual_embeds: [V, H], or None where `inputs_embeds` holds them already.
            query_mask: bool [B, T], or None where the model has no queries or `inputs_embeds` holds them already.

        Raises:
            ValueError: visual tokens and placeholders differ in number; both are named. In a graph: an assertion.
        """
        if torch.compiler.is_compiling() or (visual_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            # A value that the host reads breaks a graph. So nobody knows what the kept positions are, and the last
            # layer computes all; the count is that of the pictures, and read (which breaks) where only a mask is given.
            count = int(visual_mask.sum()) if visual_embeds is None else visual_embeds.shape[0]
            if visual_embeds is not None:
                # Checked on the device, which cannot name the counts.
                torch._assert_async(
                    visual_mask.sum() == count,
                    f"image placeholders (id {self.config.image_token_id}) and visual tokens differ in number",
                )
            if query_mask is not None:
                count += int(query_mask.sum())
            return make_routing_plan(visual_mask, count, query_mask), None
        # The only read of a forward, in which the host waits for the device: so early that little is queued there.
        routed = visual_mask if query_mask is None else visual_mask | query_mask
        counts = [visual_mask.sum(), (routed[:, -keep:] if keep else routed).sum()]
        if query_mask is not None:
            counts += [query_mask.sum(), (query_mask.sum(-1) % self.config.num_learnable_queries).count_nonzero()]
        placeholders, visual_kept, queries, broken_rows = (torch.stack(counts).tolist() + [0, 0])[:4]
        if visual_embeds is not None and visual_embeds.shape[0] != placeholders:
            raise ValueError(
                f"the pictures give {visual_embeds.shape[0]} visual tokens but the input has {placeholders} image "
                f"placeholders (id {self.config.image_token_id}); they must match (who splits a batch has to split its "
                "tiles with it, which TRL's GRPO and RLOO do only for max_tiles=1)"
            )
        keep = keep if visual_kept == 0 else None
        if broken_rows:
            refuse_broken_blocks(broken_rows, self.config)
        # While training a plan without visual tokens: point 4 above.
        if placeholders + queries == 0 and not self.training:
            return None, keep
        return make_routing_plan(visual_mask, placeholders + queries, query_mask), keep

    def _fill_in(self, inputs_embeds: torch.Tensor, routing: RoutingPlan, visual_embeds: torch.Tensor) -> torch.Tensor:
        """[B, T, H] with visual tokens and queries in the places of their placeholders."""
        if self.learnable_queries is not None:
            queries = self.learnable_queries(routing.visual.shape[0] - visual_embeds.shape[0])
            visual_embeds = torch.cat([visual_embeds, queries.to(visual_embeds)])
        flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
        return flat.index_copy(0, routing.visual, visual_embeds.to(flat)).view_as(inputs_embeds)

    @checked_keywords
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        visual_token_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        keep: int | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> MonoInternVLModelOutputWithPast:
        """See `MonoInternVLForCausalLM.forward`.

        Args:
            keep: the last layer may compute only the last so many positions; None: all.
            mm_token_type_ids: accepted because processors and engines pass it; routing needs only the placeholders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        device = (input_ids if inputs_embeds is None else inputs_embeds).device  # type: ignore[union-attr]
        image_outputs = self._image_outputs(pixel_values, mm_encoder_outputs, visual_token_mask, device)
        visual_embeds = self._visual_embeds(image_outputs, input_ids if visual_token_mask is None else None)
        visual_mask = visual_token_mask
        if visual_mask is None and visual_embeds is not None:
            visual_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        query_id = self.config.query_token_id if visual_embeds is not None else None
        query_mask = None if query_id is None else self.get_placeholder_mask(input_ids, inputs_embeds, query_id)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        routing = None
        if visual_mask is not None:
            if visual_mask.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"visual_token_mask must be [B, T] = {tuple(inputs_embeds.shape[:2])} of the current input, "
                    f"got {tuple(visual_mask.shape)}"
                )
            visual_mask = visual_mask.to(device=inputs_embeds.device, dtype=torch.bool)
            routing, keep = self._route(visual_mask, visual_embeds, keep, query_mask)
        if routing is not None and visual_embeds is not None:
            inputs_embeds = self._fill_in(inputs_embeds, routing, visual_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            keep=keep,
            return_dict=True,
            **kwargs,
        )
        return MonoInternVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_embeds,
            image_outputs=image_outputs,
            **{CACHE: cache_of(outputs)},
        )


class MonoInternVLForCausalLM(
    MonoInternVLChatMixin, MonoInternVLGenerationMixin, StrictLoadingMixin, MonoInternVLPreTrainedModel
):
    """Mono-InternVL with its output head, `generate` and `chat`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Not quantised: few weights, through which every visual token comes in and every token goes out. A name, or, as
    # torchao compares parameters and bitsandbytes modules, an expression from the name's start.
    _unquantized_modules = ["model.vision_embeddings", "model.multi_modal_projector", r".*\.output_gate", "lm_head"]

    def __init__(self, config: MonoInternVLConfig, **unknown: Any):
        refuse_unknown(f"{type(self).__name__}.from_pretrained", unknown)
        super().__init__(config)
        self.model = MonoInternVLModel(config)
        self.lm_head = MonoInternVLOutputHead(config.text_config.hidden_size, config.text_config.vocab_size)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        # transformers replaces the head by a plain layer when the vocabulary is resized.
        self.lm_head = MonoInternVLOutputHead.of(new_embeddings)

    @checked_keywords
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `MonoInternVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @checked_keywords
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        visual_token_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> MonoInternVLCausalLMOutputWithPast:
        """Patches and ids to logits.

        Args:
            input_ids: int64 [B, T]; one `config.image_token_id` for each visual token.
            attention_mask: [B, S], 0 at padding.
            position_ids: int64 [B, T]; default counts from the cache's length.
            past_key_values, cache: two names of the cache, of older and of newer transformers; either is taken.
            pixel_values: [tiles, P, 3*28*28] or [tiles, 3, side, side] of the whole batch, in the order of the
                placeholders in `input_ids`; not those of pictures that lie in the cache. A tensor of no tiles is
                allowed; float normalised, or uint8, normalised here.
            labels: int64 [B, T], -100 is ignored, and so are placeholders: no position learns to predict a visual
                token. Shifted here; `shift_labels` are taken as they are.
            visual_token_mask: bool [B, T] of the current input: which tokens go to the visual experts. Derived from
                the placeholders when pixels are given; needed only if `inputs_embeds` holds visual tokens already.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`.
            logits_to_keep: the last so many positions (0: all), or their indices.

        Raises:
            ValueError: visual tokens and placeholders differ in number; both counts are named. Not checked at inference
                where there is neither a picture nor a mask nor a query: the placeholders of such a call are text.
        """
        for name in _RECORDED:
            # The decoder, which records them, sees only its own part of the configuration.
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.config, name, False) or getattr(self.config.text_config, name, False)
        # What is recorded has all positions; and with `keep` the last layer's visual expert would get no gradient.
        whole = (self.training and torch.is_grad_enabled()) or any(map(kwargs.get, _RECORDED))
        keep = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 and not whole else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            visual_token_mask=visual_token_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            keep=keep,
            return_dict=True,
            **kwargs,
        )
        # 0 is all; where the last layer has cut already, this cuts nothing.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            placeholders = self.config.image_token_id, self.config.query_token_id
            loss = next_token_loss(self.loss_function, logits, labels, placeholders=placeholders, **kwargs)
        return MonoInternVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            **{CACHE: cache_of(outputs)},
        )


MonoInternVLForCausalLM.register_for_auto_class("AutoModel")

# The first three belong to other files; whoever imports the model finds them here too.
__all__ = [
    "AnswerStreamer",
    "cpu_has_bfloat16_units",
    "place_images",
    "MonoInternVLForCausalLM",
    "MonoInternVLModel",
    "MonoInternVLPreTrainedModel",
    "MonoInternVLTextModel",
]
