"""Mono-InternVL: patches + ids -> logits. What differs from a plain Llama-like decoder:

1. No vision encoder. A 28 x 28 px patch is embedded linearly and is one token (`vision_mono_internvl.py`).
2. Two feed-forward experts per layer: `visual_mlp` (FFN_v) for visual tokens, `mlp` (FFN_t) for all others
   (paper 2410.08202, eq. 4). Routing is by the token, not by the phase, and every token passes through exactly one.
3. With `visual_attention_experts` (1.5, paper 2507.12566) visual tokens also have their own q/k/v (and o) projections.
4. One `RoutingPlan` per forward, made from the positions of the visual tokens. Text-only calls and decoding have none:
   then a layer is a plain dense layer and the visual experts are not even read.
5. The last layer computes only the rows that `logits_to_keep` asks for.
6. RoPE with a stateless, branch-free dynamic NTK: it never depends on an earlier call.

Shapes: B batch, T current tokens, S all tokens incl. cache, N = B*T, V visual tokens, H hidden, D head_dim, P patches.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mono_internvl import eager_attention_forward, last_queries, own_attention, packed_samples, prompt_mask
from .chat_mono_internvl import AnswerStreamer, MonoInternVLChatMixin
from .compat_mono_internvl import (
    CACHE,
    CacheNames,
    cache_of,
    checked_keywords,
    cpu_has_bfloat16_units,
    one_cache,
    register_causal_lm,
    update_cache,
)
from .configuration_mono_internvl import MonoInternVLConfig, MonoInternVLTextConfig
from .generation_mono_internvl import MonoInternVLGenerationMixin
from .image_processing_mono_internvl import patchify
from .loading_mono_internvl import SavingMixin, StrictLoadingMixin, refuse_unknown
from .output_head_mono_internvl import MonoInternVLOutputHead
from .prompt_mono_internvl import place_images
from .rope_mono_internvl import MonoInternVLRotaryEmbedding, rotate, signed
from .training_mono_internvl import make_drop_path, next_token_loss, no_tiles, without_cache
from .vision_mono_internvl import MonoInternVLMultiModalProjector, MonoInternVLVisionEmbeddings
from .weight_mapping_mono_internvl import register_checkpoint_mapping


register_checkpoint_mapping(MonoInternVLConfig.model_type)
register_causal_lm(MonoInternVLConfig.model_type, "MonoInternVLForCausalLM")


# --------------------------------------------------------------------------------------------------------- routing


class RoutingPlan(NamedTuple):
    """Which rows of a flattened [N, H] batch go to which expert; made once per forward, used by every layer.

    Attributes:
        text: int64 [N - V], rows of all other tokens, ascending.
        visual: int64 [V], rows of visual tokens, ascending.
    """

    text: torch.Tensor
    visual: torch.Tensor

    def dispatch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, H] -> text rows [N - V, H] and visual rows [V, H]."""
        rows = x.reshape(-1, x.shape[-1])
        return rows.index_select(0, self.text), rows.index_select(0, self.visual)

    def combine(self, text: torch.Tensor, visual: torch.Tensor, batch_shape: torch.Size) -> torch.Tensor:
        """The inverse of `dispatch`; every row of the result is written exactly once, in place."""
        out = text.new_empty((self.text.shape[0] + self.visual.shape[0], text.shape[-1]))
        out.index_copy_(0, self.text, text).index_copy_(0, self.visual, visual)
        return out.view(*batch_shape, -1)


def make_routing_plan(visual_token_mask: torch.Tensor, num_visual: int) -> RoutingPlan:
    """bool [B, T] and its count, known on the host: no shape depends on data and the device is not waited for."""
    order = torch.argsort((~visual_token_mask).reshape(-1).to(torch.int8), stable=True)
    return RoutingPlan(text=order[num_visual:], visual=order[:num_visual])


# ---------------------------------------------------------------------------------------------------------- decoder


@use_kernel_forward_from_hub("RMSNorm")
class MonoInternVLRMSNorm(nn.Module):
    """RMSNorm in float32, cast back, then weighted; `from_pretrained(use_kernels=True)` may bring another kernel."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)


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

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=config.attention_bias)

        self.q_proj = linear(config.hidden_size, width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(width, config.hidden_size)
        self.visual_qkv = config.visual_attention_experts in ("qkv", "qkvo")
        self.visual_o = config.visual_attention_experts == "qkvo"
        if self.visual_qkv:
            self.visual_q_proj = linear(config.hidden_size, width)
            self.visual_k_proj = linear(config.hidden_size, kv_width)
            self.visual_v_proj = linear(config.hidden_size, kv_width)
        if self.visual_o:
            self.visual_o_proj = linear(width, config.hidden_size)

    def project(self, x: torch.Tensor, routing: RoutingPlan | None, queries: int | None) -> tuple[torch.Tensor, ...]:
        """[B, T, H] -> q, k, v; `queries`: only the last so many rows get a query (they are text then)."""
        if routing is None or not self.visual_qkv:
            return self.q_proj(x if queries is None else x[:, -queries:]), self.k_proj(x), self.v_proj(x)
        text, visual = routing.dispatch(x)
        k = routing.combine(self.k_proj(text), self.visual_k_proj(visual), x.shape[:2])
        v = routing.combine(self.v_proj(text), self.visual_v_proj(visual), x.shape[:2])
        if queries is not None:
            return self.q_proj(x[:, -queries:]), k, v
        return routing.combine(self.q_proj(text), self.visual_q_proj(visual), x.shape[:2]), k, v

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        routing: RoutingPlan | None = None,
        queries: int | None = None,
        samples: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = self.project(hidden_states, routing, queries)
        q, k, v = (x.view(*x.shape[:2], -1, self.head_dim) for x in (q, k, v))
        cos, sin = position_embeddings
        q = rotate(q, cos, sin) if queries is None else rotate(q, cos[:, -queries:], sin[:, -queries:])
        q, k, v = (x.transpose(1, 2) for x in (q, rotate(k, cos, sin), v))
        if cache is not None:
            k, v = update_cache(cache, k, v, self.layer_idx, kwargs)

        dropout = self.attention_dropout if self.training else 0.0
        # transformers reads this file for the next call before it lets anyone change the backend.
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attend = own_attention(self, q, attention_mask, cache, samples) or backend
        if samples is not None:
            kwargs["samples"] = samples
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*out.shape[:2], -1).contiguous()
        if routing is None or not self.visual_o or queries is not None:
            return self.o_proj(out), weights
        text, visual = routing.dispatch(out)
        return routing.combine(self.o_proj(text), self.visual_o_proj(visual), out.shape[:2]), weights


class MonoInternVLMLP(nn.Module):
    """SwiGLU: down(act(gate x) * up x), no biases."""

    def __init__(self, config: MonoInternVLTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        return self.down_proj(gate * up if torch.is_grad_enabled() else gate.mul_(up))


class MonoInternVLDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MonoInternVLTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MonoInternVLAttention(config, layer_idx)
        self.mlp = MonoInternVLMLP(config)
        self.visual_mlp = MonoInternVLMLP(config)
        self.input_layernorm = MonoInternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MonoInternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.drop_path = make_drop_path(config, layer_idx)

    def feed_forward(self, x: torch.Tensor, routing: RoutingPlan | None) -> torch.Tensor:
        if routing is None:
            return self.mlp(x)
        text, visual = routing.dispatch(x)
        return routing.combine(self.mlp(text), self.visual_mlp(visual), x.shape[:2])

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        routing: RoutingPlan | None = None,
        keep: int | None = None,
        queries: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, T, H] -> [B, T, H], or [B, keep, H]: the last `keep` rows, which must be text when there is a plan.

        `queries` (`keep` or None): whether attention too computes only those rows.
        """
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            routing=routing,
            queries=queries,
            **kwargs,
        )
        if keep is not None:
            hidden_states, attended, routing = hidden_states[:, -keep:], attended[:, -keep:], None
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.feed_forward(self.post_attention_layernorm(hidden_states), routing))


# ----------------------------------------------------------------------------------------------------------- models


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
        # Non-persistent buffers are left uninitialised by a load through the meta device, so they get their line here.
        if isinstance(module, MonoInternVLVisionEmbeddings):
            init.normal_(module.position_embedding, mean=0.0, std=module.config.initializer_range)
            init.zeros_(module.class_embedding)
            init.copy_(module.pixel_mean, torch.tensor(module.config.image_mean, dtype=torch.float32))
            init.copy_(module.pixel_std, torch.tensor(module.config.image_std, dtype=torch.float32))
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
        """`keep`: the last layer computes only the last so many rows of each sequence, which must be text."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = one_cache(cache, past_key_values)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            without_cache(cache)
            cache = None
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        samples = packed_samples(self.config, inputs_embeds.shape[0], attention_mask, cache, position_ids)
        mask = None
        if samples is None:
            mask = prompt_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        x = inputs_embeds
        cos, sin = self.rotary_emb(x, position_ids)
        position_embeddings = cos, signed(sin)
        if keep is not None and keep >= x.shape[1]:
            keep = None
        last_mask, queries = (mask, None) if samples is not None else last_queries(self.config, mask, keep, cache)
        for index, layer in enumerate(self.layers, 1):
            is_last = index == len(self.layers)
            x = layer(
                x,
                attention_mask=last_mask if is_last else mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                routing=routing,
                keep=keep if is_last else None,
                queries=queries if is_last else None,
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
        self.post_init()

    @checked_keywords
    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed tiles.

        Args:
            pixel_values: [tiles, P, 3*28*28] or [tiles, 3, S, S]; float (normalised) or uint8 (normalised here).

        Returns:
            `last_hidden_state` [tiles, P, 4 * C] before and `pooler_output` [tiles, P, H] after the projector.
        """
        if pixel_values.dim() == 4:
            pixel_values = patchify(pixel_values)
        elif pixel_values.dim() != 3:
            raise ValueError(
                f"pixel_values must be [tiles, patches, 3*28*28] or [tiles, 3, S, S], got {tuple(pixel_values.shape)}"
            )
        embedded = self.vision_embeddings(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=embedded, pooler_output=self.multi_modal_projector(embedded)
        )

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """bool [B, T]: where placeholders are; without ids, where an embedding equals the placeholder's."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _image_outputs(
        self, pixel_values: torch.Tensor | None, mm_encoder_outputs: dict | None, device: torch.device
    ) -> BaseModelOutputWithPooling | None:
        """The embedded tiles of this call, or None when it has no picture."""
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            return mm_encoder_outputs["image"]
        if pixel_values is None and self.training and torch.is_grad_enabled():
            pixel_values = no_tiles(self.config.vision_config, device)
        return None if pixel_values is None else self.get_image_features(pixel_values, return_dict=True)

    @staticmethod
    def _rows(image_outputs: BaseModelOutputWithPooling | None) -> torch.Tensor | None:
        """Visual tokens of embedded tiles, [V, H]."""
        if image_outputs is None:
            return None
        pooled: Any = image_outputs.pooler_output
        tensors = [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)
        rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _route(
        self, mask: torch.Tensor, rows: torch.Tensor | None, keep: int | None
    ) -> tuple[RoutingPlan | None, int | None]:
        """The plan for this forward, and `keep` if the last layer may compute those rows alone: all of them are text.

        Raises:
            ValueError: as many visual tokens as placeholders are needed; names both counts.
        """
        if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            # Nothing can be looked at here; whether the kept rows are text is unknown, so the last layer does them all.
            count = int(mask.sum()) if rows is None else rows.shape[0]
            if rows is not None:
                # The check that neither breaks the graph nor waits for the device; it cannot name the counts.
                torch._assert_async(
                    mask.sum() == count,
                    f"image placeholders (id {self.config.image_token_id}) and visual tokens differ in number",
                )
            return make_routing_plan(mask, count), None
        # The one read of a forward: when a prompt begins, the device has nothing queued that it would wait for.
        placeholders, kept = torch.stack([mask.sum(), mask[:, -(keep or 0) :].sum()]).tolist()
        if rows is not None and rows.shape[0] != placeholders:
            raise ValueError(
                f"the pictures give {rows.shape[0]} visual tokens but the input has {placeholders} image placeholders "
                f"(id {self.config.image_token_id}); they must match (who cuts a batch by rows has to cut its tiles "
                "with them, which TRL's GRPO and RLOO do only for max_tiles=1)"
            )
        keep = keep if kept == 0 else None
        if placeholders == 0 and not (self.training and rows is not None):
            return None, keep
        return make_routing_plan(mask, placeholders), keep

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
        """See `MonoInternVLForCausalLM.forward`. `mm_token_type_ids` is accepted because processors and engines pass
        it; routing needs only the placeholders."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        device = (input_ids if inputs_embeds is None else inputs_embeds).device  # type: ignore[union-attr]
        image_outputs = self._image_outputs(pixel_values, mm_encoder_outputs, device)
        rows = self._rows(image_outputs)
        mask = visual_token_mask
        if mask is None and rows is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        routing = None
        if mask is not None:
            if mask.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"visual_token_mask must be [B, T] = {tuple(inputs_embeds.shape[:2])} of the current input, "
                    f"got {tuple(mask.shape)}"
                )
            mask = mask.to(device=inputs_embeds.device, dtype=torch.bool)
            routing, keep = self._route(mask, rows, keep)
        if routing is not None and rows is not None:
            flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
            flat = flat.index_copy(0, routing.visual, rows.to(flat.device, flat.dtype))
            inputs_embeds = flat.view_as(inputs_embeds)

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
            image_hidden_states=rows,
            image_outputs=image_outputs,
            **{CACHE: cache_of(outputs)},
        )


class MonoInternVLForCausalLM(
    MonoInternVLChatMixin, MonoInternVLGenerationMixin, StrictLoadingMixin, MonoInternVLPreTrainedModel
):
    """Mono-InternVL with its output head, `generate` and `chat`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # The way in and the way out keep their precision when weights are quantised: few weights, for every token's sake.
    _unquantized_modules = ["model.vision_embeddings", "model.multi_modal_projector", "lm_head"]

    def __init__(self, config: MonoInternVLConfig, **unknown: Any):
        refuse_unknown(f"{type(self).__name__}.from_pretrained", unknown)
        super().__init__(config)
        self.model = MonoInternVLModel(config)
        self.lm_head = MonoInternVLOutputHead(config.text_config.hidden_size, config.text_config.vocab_size)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        # Resizing the vocabulary makes a plain layer.
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
            pixel_values: [tiles, P, 3*28*28] or [tiles, 3, S, S] of all rows, in order; zero tiles are allowed; float
                normalised, or uint8, normalised here.
            labels: int64 [B, T], -100 is ignored, and so are placeholders: nothing is to be learnt about where a
                visual token comes. Shifted here; `shift_labels` are taken as they are.
            visual_token_mask: bool [B, T] of the current input: which tokens go to the visual experts. Derived from
                the placeholders when pixels are given; needed only with `inputs_embeds`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`.
            logits_to_keep: the last so many positions (0: all), or their indices.

        Raises:
            ValueError: visual tokens and placeholders differ in number; both counts are named.
        """
        recorded = any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        keep = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 and not recorded else None
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = next_token_loss(
                self.loss_function,
                logits,
                labels,
                placeholder=self.config.image_token_id,
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
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

__all__ = [
    "AnswerStreamer",
    "cpu_has_bfloat16_units",
    "place_images",
    "MonoInternVLForCausalLM",
    "MonoInternVLModel",
    "MonoInternVLPreTrainedModel",
    "MonoInternVLTextModel",
]
