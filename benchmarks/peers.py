"""The model at its real dimensions with random weights, and whom it is measured against.

dense twin      `LlamaForCausalLM` of the same dimensions: a text model of the same activated size
modular twin    InternVL-1.5 from transformers' own classes: a vision tower in front of the same text model
both experts    the released formula: every token through FFN_t and FFN_v, the right result chosen by a mask

All share the text path's weights, tensor by tensor, so they cost memory once.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..common.models import BUNDLED_MODEL
from ..common.parameters import released_2b_config
from ..configuration_mono_internvl import MonoInternVLConfig
from ..image_processing_mono_internvl import unpatchify
from ..modeling_mono_internvl import MonoInternVLDecoderLayer, MonoInternVLForCausalLM, RoutingPlan
from ..output_head_mono_internvl import MonoInternVLOutputHead
from ..tiling_mono_internvl import PATCH_DIM
from .measure import Place


PRESETS = ("2b", "nano")
# (visual, text) tokens of the paper's Table 6.
PAPER_SIZES = ((768, 256), (1792, 256), (3840, 256))


def preset_config(preset: str, layers: int | None = None) -> MonoInternVLConfig:
    """The dimensions of the released 2B model or of the bundled nano, with `layers` layers (default: all).

    Raises:
        ValueError: no such preset, or fewer than one layer or more than there are.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    config = released_2b_config() if preset == "2b" else MonoInternVLConfig.from_pretrained(BUNDLED_MODEL)
    depth = config.text_config.num_hidden_layers
    if layers is not None:
        if not 1 <= layers <= depth:
            raise ValueError(f"layers must be 1 to {depth} for the preset {preset}, got {layers}")
        config.text_config.num_hidden_layers = layers
    config.text_config.drop_path_rate = 0.0
    return config


def build(config: MonoInternVLConfig, place: Place, attention: str = "sdpa") -> MonoInternVLForCausalLM:
    """Our model with random weights."""
    torch.manual_seed(0)
    with torch.device(place.device):
        model = MonoInternVLForCausalLM._from_config(config, dtype=place.dtype, attn_implementation=attention)
    return model.eval()


def _adopt(target: nn.Module, source: dict[str, nn.Parameter], place: Place, names: dict[str, str]) -> None:
    """Put `source`'s tensors into `target`, which is on the meta device; make random ones where it has none.

    `names`: beginnings of target names -> beginnings of source names.
    """
    for name, parameter in list(target.named_parameters()):
        known = next((name.replace(new, old, 1) for new, old in names.items() if name.startswith(new)), None)
        path, _, leaf = name.rpartition(".")
        if known is None:
            fresh = torch.empty(parameter.shape, device=place.device, dtype=place.dtype).normal_(std=0.02)
            if parameter.dim() == 1:
                fresh.fill_(0.0 if leaf == "bias" else 1.0)
            value = nn.Parameter(fresh)
        else:
            value = source[known]
        setattr(target.get_submodule(path), leaf, value)


def dense_config(config: MonoInternVLConfig) -> LlamaConfig:
    text = config.text_config
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    rope = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
    return LlamaConfig(**{name: getattr(text, name) for name in names}, rope_parameters=rope)


def dense_twin(model: MonoInternVLForCausalLM, place: Place) -> LlamaForCausalLM:
    config = dense_config(model.config)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    _adopt(twin, dict(model.named_parameters()), place, {"model.": "model.language_model.", "lm_head.": "lm_head."})
    # What the head costs is not what is compared.
    twin.lm_head = MonoInternVLOutputHead.of(twin.lm_head)  # type: ignore[assignment]
    twin.model.rotary_emb = LlamaRotaryEmbedding(config).to(place.device)
    return twin.eval()


def modular_twin(model: MonoInternVLForCausalLM, place: Place) -> InternVLForConditionalGeneration:
    """InternVL-1.5-2B for the 2B dimensions; as many vision layers as text layers, as in the original (24, 24)."""
    ours = model.config
    channels = ours.vision_config.hidden_size
    vision = InternVLVisionConfig(
        hidden_size=channels,
        num_hidden_layers=ours.text_config.num_hidden_layers,
        num_attention_heads=max(1, channels // 64),
        intermediate_size=4 * channels,
        patch_size=[14, 14],
        image_size=[ours.vision_config.image_size] * 2,
        attention_bias=True,
        use_qk_norm=False,
        norm_type="layer_norm",
        use_mean_pooling=True,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=0.1,
    )
    text = dense_config(ours)
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ours.image_token_id,
        image_seq_length=ours.vision_config.tokens_per_tile,
        tie_word_embeddings=False,
    )
    for part in (config, text, vision):
        part._attn_implementation = ours._attn_implementation
    with torch.device("meta"):
        twin = InternVLForConditionalGeneration(config)
    names = {"model.language_model.": "model.language_model.", "lm_head.": "lm_head."}
    _adopt(twin, dict(model.named_parameters()), place, names)
    twin.lm_head = MonoInternVLOutputHead.of(twin.lm_head)  # type: ignore[assignment]
    twin.model.language_model.rotary_emb = LlamaRotaryEmbedding(text).to(place.device)
    return twin.eval()


class BothExpertsLayer(MonoInternVLDecoderLayer):
    """The released formula, `FFN_v(x) * mask + FFN_t(x) * (1 - mask)`, on every token."""

    def feed_forward(self, x: torch.Tensor, routing: RoutingPlan | None) -> torch.Tensor:
        if routing is None:
            return self.mlp(x)
        rows = x.reshape(-1, x.shape[-1])
        mask = torch.zeros(rows.shape[0], 1, device=x.device, dtype=x.dtype).index_fill(0, routing.visual, 1.0)
        return (self.visual_mlp(rows) * mask + self.mlp(rows) * (1 - mask)).view_as(x)


def both_experts(model: MonoInternVLForCausalLM, place: Place) -> MonoInternVLForCausalLM:
    with torch.device("meta"):
        twin = MonoInternVLForCausalLM._from_config(
            model.config, dtype=place.dtype, attn_implementation=model.config._attn_implementation
        )
        layers = twin.model.language_model.layers
        for number in range(len(layers)):
            layers[number] = BothExpertsLayer(twin.config.text_config, number).to(place.dtype)
    _adopt(twin, dict(model.named_parameters()), place, {"": ""})
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(twin.get_submodule(path), name, buffer)
    return twin.eval()


# -------------------------------------------------------------------------------------------------------------- inputs


class Prompt(NamedTuple):
    """A prompt with one picture: `input_ids` int64 [B, T], `pixel_values` [tiles, P, 3*28*28]."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    visual: int

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def tiles(self) -> torch.Tensor:
        """The picture as the modular twin takes it, [tiles, 3, S, S]."""
        return unpatchify(self.pixel_values)


def make_prompt(config: MonoInternVLConfig, visual: int, text: int, place: Place, batch: int = 1) -> Prompt:
    """Random ids and pixels; the visual tokens, in whole tiles, follow the first quarter of the text."""
    per_tile = config.vision_config.tokens_per_tile
    tiles = visual // per_tile
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, config.image_start_token_id, (batch, text), generator=generator)
    picture = torch.full((batch, tiles * per_tile), config.image_token_id)
    ids = torch.cat([words[:, : text // 4], picture, words[:, text // 4 :]], 1)
    pixels = torch.randn(batch * tiles, per_tile, PATCH_DIM, generator=generator)
    return Prompt(ids.to(place.device), pixels.to(place.device, place.dtype), tiles * per_tile)


# ------------------------------------------------------------------------------------------------------------ forwards


def prefill(model: Any, prompt: Prompt, keep: int = 0) -> torch.Tensor:
    """Logits of our model, or of the both-experts one."""
    return model(
        input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, logits_to_keep=keep, use_cache=False
    ).logits


def dense_prefill(model: LlamaForCausalLM, prompt: Prompt, keep: int = 0) -> torch.Tensor:
    return model(input_ids=prompt.input_ids, logits_to_keep=keep, use_cache=False).logits


def llama_prefill(decoder: Any, head: nn.Module, embeds: torch.Tensor, keep: int = 0) -> torch.Tensor:
    """What a Llama's forward does, without its look at the mask, which no CUDA graph can hold; causal attention."""
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    rotary = decoder.rotary_emb(embeds, positions)
    x = embeds
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return head(decoder.norm(x)[:, -keep:])


def graph_prefills(
    ours: Any, prompt: Prompt, keep: int = 0, *, dense: Any = None, both: Any = None, modular: Any = None
) -> dict[str, Any]:
    """The same forwards in a form that a CUDA graph can hold: nothing looks at the data."""
    functions: dict[str, Any] = {"ours": partial(prefill, ours, prompt, keep)}
    if dense is not None:
        functions["dense"] = lambda: llama_prefill(
            dense.model, dense.lm_head, dense.model.embed_tokens(prompt.input_ids), keep
        )
    if both is not None:
        functions["both"] = partial(prefill, both, prompt, keep)
    if modular is not None:
        tiles = prompt.tiles
        rows = (prompt.input_ids.reshape(-1) == modular.config.image_token_id).nonzero().squeeze(1)

        def run_modular() -> torch.Tensor:
            base = modular.model
            features = base.get_image_features(pixel_values=tiles).pooler_output
            embeds = base.language_model.embed_tokens(prompt.input_ids)
            flat = embeds.flatten(0, 1).index_copy(0, rows, features.flatten(0, 1))
            return llama_prefill(base.language_model, modular.lm_head, flat.view_as(embeds), keep)

        functions["modular"] = run_modular
    return functions
