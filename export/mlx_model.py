"""Mono-InternVL for mlx-vlm, which runs this file from the model folder (`"model_file"` in config.json).

    pixels -> patch embedding + projector -> one vector per visual token, in the places of their placeholders
    ids, embeddings -> decoder; a token is visual when its id is `<IMG_CONTEXT>`, and goes through the visual experts

`mono-internvl export mlx` writes it beside the weights, whose names are the attributes of `Model`. Pictures and chats
are read by the processor's own files beside it; they need torch, of which a CPU build will do, and nothing else that
mlx-vlm does not have.

Shapes: B sequences, T tokens, H hidden, V visual tokens, P tokens of a tile, C channels of a small patch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache as cached
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_vlm.models.base import (
    BaseModelConfig,
    InputEmbeddingsFeatures,
    LanguageModelOutput,
    create_attention_mask,
    scaled_dot_product_attention,
)
from mlx_vlm.models.rope_utils import initialize_rope
from mlx_vlm.prompt_utils import MODEL_CONFIG, MessageFormat
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module


MODEL_TYPE = "mono_internvl"
# What mlx-vlm's `load` takes for the weights.
LOAD_OPTIONS = ("quantize_activations", "expert_cache_gb", "max_kv_size", "force_download")
Processor: Any = get_class_from_dynamic_module("processing_mono_internvl.MonoInternVLProcessor", Path(__file__).parent)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass
class TextConfig(BaseModelConfig):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    visual_attention_experts: str = "none"


@dataclass
class VisionConfig(BaseModelConfig):
    hidden_size: int
    image_size: int
    patch_size: int
    image_mean: list[float]
    image_std: list[float]


@dataclass
class ModelConfig(BaseModelConfig):
    text_config: TextConfig
    vision_config: VisionConfig
    model_type: str
    image_token_id: int
    image_start_token_id: int
    image_end_token_id: int
    eos_token_id: list[int] = field(default_factory=list)

    @property
    def image_token_index(self) -> int:
        """What mlx-vlm calls the same."""
        return self.image_token_id


# ------------------------------------------------------------------------------------------------------------- pictures


class PatchEmbedding(nn.Module):
    """[n, 3, p, p] -> [n, C]: a convolution that sees one small patch at a time is one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = mx.zeros((config.hidden_size, 3, config.patch_size, config.patch_size))
        self.bias = mx.zeros((config.hidden_size,))

    def __call__(self, patches: mx.array) -> mx.array:
        return patches.astype(self.weight.dtype).flatten(1) @ self.weight.flatten(1).T + self.bias


class VisionEmbeddings(nn.Module):
    """Pixels -> one vector per visual token: linear patches, learned positions, 2 x 2 neighbours concatenated."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.side = config.image_size // config.patch_size
        self.patch_embedding = PatchEmbedding(config)
        # Row 0 belongs to the class token of the checkpoints, which nothing uses.
        self.position_embedding = mx.zeros((1, 1 + self.side**2, config.hidden_size))

    def positions(self, side: int) -> mx.array:
        """[side * side, C]; bicubic in float32 when the tile has another size than the table's."""
        table = self.position_embedding[0, 1:]
        if side == self.side:
            return table
        weights = mx.array(bicubic_weights(self.side, side))
        grid = table.astype(mx.float32).reshape(self.side, self.side, -1)
        grid = mx.tensordot(weights, mx.tensordot(weights, grid, [[1], [0]]), [[1], [1]]).swapaxes(0, 1)
        return grid.reshape(side * side, -1).astype(table.dtype)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """[tiles, P, 3*2p*2p], normalised, or uint8 -> [tiles, P, 4 * C].

        Raises:
            ValueError: another shape.
        """
        tiles, patches, width = pixel_values.shape
        side, p = round(patches**0.5), self.config.patch_size
        if width != 3 * (2 * p) ** 2 or side * side != patches or side == 0:
            raise ValueError(
                f"pixel_values of shape {list(pixel_values.shape)} do not fit: expected [tiles, patches, "
                f"{3 * (2 * p) ** 2}] with a square number of patches"
            )
        x = pixel_values.reshape(tiles, patches, 3, 2, p, 2, p)
        if x.dtype == mx.uint8:
            mean, std = (mx.array(values).reshape(3, 1, 1, 1, 1) for values in self._normalisation())
            x = (x.astype(mx.float32) / 255 - mean) / std
        # Four small patches each, in the order (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1).
        x = self.patch_embedding(x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, 3, p, p)).reshape(tiles, patches, 4, -1)
        positions = self.positions(2 * side).reshape(side, 2, side, 2, -1).swapaxes(1, 2).reshape(patches, 4, -1)
        return (x + positions).reshape(tiles, patches, -1)

    def _normalisation(self) -> tuple[list[float], list[float]]:
        return self.config.image_mean, self.config.image_std


@cached
def bicubic_weights(given: int, wanted: int) -> np.ndarray:
    """float32 [wanted, given]: cubic interpolation (a = -0.75, pixel centres, edges repeated) along one side."""

    def weight(x: np.ndarray) -> np.ndarray:
        a, x = -0.75, np.abs(x)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    centres = (np.arange(wanted) + 0.5) * given / wanted - 0.5
    matrix = np.zeros((wanted, given))
    for step in range(-1, 3):
        places = np.floor(centres).astype(int) + step
        np.add.at(matrix, (np.arange(wanted), places.clip(0, given - 1)), weight(centres - places))
    return matrix.astype(np.float32)


class MultiModalProjector(nn.Module):
    """[.., 4 * C] -> [.., H]: LayerNorm, linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.gelu(self.linear_1(self.layer_norm(x))))


# -------------------------------------------------------------------------------------------------------------- routing


class Routing(NamedTuple):
    """Rows of a step that has visual tokens, as indices into its B * T rows.

    Attributes:
        text, visual: rows of each kind, in order.
        back: where each row stands in text + visual.
    """

    text: mx.array
    visual: mx.array
    back: mx.array


def route(ids: mx.array, image_token_id: int) -> Routing | None:
    """int [B, T] -> which expert each row goes to; None where no token is visual."""
    visual = np.array(ids).reshape(-1) == image_token_id
    if not visual.any():
        return None
    order = np.argsort(visual, kind="stable")
    count = int(len(order) - visual.sum())
    return Routing(mx.array(order[:count]), mx.array(order[count:]), mx.array(np.argsort(order)))


def by_modality(x: mx.array, routing: Routing | None, text: nn.Module, visual: nn.Module) -> mx.array:
    """[B, T, in] -> [B, T, out], each row through one of the two."""
    if routing is None:
        return text(x)
    rows = x.reshape(-1, x.shape[-1])
    parts = [text(rows[routing.text])] if routing.text.size else []
    y = mx.concatenate([*parts, visual(rows[routing.visual])])[routing.back]
    return y.reshape(*x.shape[:-1], -1)


# -------------------------------------------------------------------------------------------------------------- decoder


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention; with visual attention experts visual tokens are projected by their own matrices."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        sizes = {
            "q": (config.hidden_size, self.heads * self.head_dim),
            "k": (config.hidden_size, self.kv_heads * self.head_dim),
            "v": (config.hidden_size, self.kv_heads * self.head_dim),
            "o": (self.heads * self.head_dim, config.hidden_size),
        }
        experts = config.visual_attention_experts
        for part, (inputs, outputs) in sizes.items():
            self[f"{part}_proj"] = nn.Linear(inputs, outputs, bias=config.attention_bias)
            if experts != "none" and part in experts:
                self[f"visual_{part}_proj"] = nn.Linear(inputs, outputs, bias=config.attention_bias)
        rope = config.rope_parameters
        # Dynamic NTK is plain RoPE up to max_position_embeddings, and `Decoder` lets nothing get beyond.
        scaling = None if rope["rope_type"] == "dynamic" else rope
        self.rope = initialize_rope(self.head_dim, rope["rope_theta"], False, scaling, config.max_position_embeddings)

    def project(self, part: str, x: mx.array, routing: Routing | None) -> mx.array:
        text, visual = self[f"{part}_proj"], self.get(f"visual_{part}_proj")
        return text(x) if visual is None else by_modality(x, routing, text, visual)

    def __call__(self, x: mx.array, mask: Any, cache: Any, routing: Routing | None) -> mx.array:
        batch, length, _ = x.shape
        q, k, v = (
            self.project(part, x, routing).reshape(batch, length, heads, self.head_dim).swapaxes(1, 2)
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        offset = 0 if cache is None else cache.offset
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache, scale=self.head_dim**-0.5, mask=mask)
        return self.project("o", y.swapaxes(1, 2).reshape(batch, length, -1), routing)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp, self.visual_mlp = MLP(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any, cache: Any, routing: Routing | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache, routing)
        return x + by_modality(self.post_attention_layernorm(x), routing, self.mlp, self.visual_mlp)


class Decoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, cache: list[Any], routing: Routing | None) -> mx.array:
        """[B, T, H] -> [B, T, H].

        Raises:
            ValueError: positions beyond `max_position_embeddings` with dynamic NTK.
        """
        self._refuse_stretching(positions_in(cache[0]) + x.shape[1])
        mask = create_attention_mask(x, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, mask, layer_cache, routing)
        return self.norm(x)

    def _refuse_stretching(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if self.config.rope_parameters["rope_type"] == "dynamic" and length > limit:
            raise ValueError(
                f"{length} tokens are more than max_position_embeddings={limit}: beyond it dynamic NTK scaling turns "
                "all keys anew with each length, which a cache of turned keys cannot follow. Shorten the conversation "
                "or lower max_tiles"
            )


def positions_in(cache: Any) -> int:
    """How many positions a layer's cache has seen; of several sequences, the longest."""
    if cache is None:
        return 0
    return cache.offset if isinstance(cache.offset, int) else int(cache.offset.max().item())


class LanguageModel(nn.Module):
    """Ids and embeddings -> logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config.text_config
        self.model_type = config.model_type
        self.image_token_id = config.image_token_id
        self.model = Decoder(self.config)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        never = np.zeros(self.config.vocab_size, dtype=np.float32)
        never[[config.image_token_id, config.image_start_token_id, config.image_end_token_id]] = -np.inf
        # The underscore keeps it out of the parameters.
        self._never_generated = mx.array(never)

    def __call__(
        self,
        inputs: mx.array,
        inputs_embeds: mx.array | None = None,
        mask: mx.array | None = None,
        cache: list[Any] | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """int [B, T], [B, T, H] -> logits [B, T or `logits_to_keep`, vocabulary]; picture tokens are never generated.

        Ids alone are a step of generation, which never makes a visual token: nothing is looked at on the host then, so
        that the next step can begin before this one has ended.
        """
        routing = None if inputs_embeds is None else route(inputs, self.image_token_id)
        x = self.model.embed_tokens(inputs) if inputs_embeds is None else inputs_embeds
        x = self.model(x, cache or [None] * len(self.layers), routing)[:, -logits_to_keep:]
        tied = self.config.tie_word_embeddings
        logits = self.model.embed_tokens.as_linear(x) if tied else self.lm_head(x)
        return LanguageModelOutput(logits=logits + self._never_generated.astype(logits.dtype))

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    @property
    def head_dim(self) -> int:
        return self.config.head_dim

    @property
    def n_kv_heads(self) -> int:
        return self.config.num_key_value_heads


class Model(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.vision_embeddings = VisionEmbeddings(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(
            4 * config.vision_config.hidden_size, config.text_config.hidden_size
        )
        self.language_model = LanguageModel(config)

    def encode_image(self, pixel_values: mx.array) -> mx.array:
        """[tiles, P, 3*2p*2p] -> visual tokens [V, H] of all pictures."""
        return self.multi_modal_projector(self.vision_embeddings(pixel_values)).flatten(0, 1)

    def get_input_embeddings(
        self, input_ids: mx.array, pixel_values: mx.array | None = None, **kwargs: Any
    ) -> InputEmbeddingsFeatures:
        """int [B, T], tiles of all pictures in order -> [B, T, H].

        Raises:
            ValueError: placeholders and visual tokens differ in number.
        """
        x = self.language_model.model.embed_tokens(input_ids)
        places = np.flatnonzero(np.array(input_ids).reshape(-1) == self.config.image_token_id)
        visual = kwargs.get("cached_image_features")
        if visual is None:
            visual = mx.zeros((0, x.shape[-1])) if pixel_values is None else self.encode_image(pixel_values)
        if len(places) != (count := visual.shape[0]):
            raise ValueError(f"the prompt has {len(places)} placeholders for {count} visual tokens; they must match")
        if count:
            rows = x.reshape(-1, x.shape[-1])
            rows[mx.array(places)] = visual.astype(x.dtype)
            x = rows.reshape(x.shape)
        return InputEmbeddingsFeatures(inputs_embeds=x)

    def __call__(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | None = None,
        mask: mx.array | None = None,
        cache: list[Any] | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        x = self.get_input_embeddings(input_ids, pixel_values, **kwargs).inputs_embeds
        return self.language_model(input_ids, inputs_embeds=x, cache=cache)

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers


# ------------------------------------------------------------------------------------------------------------ processor


class RenderedChat(str):
    """A chat as mlx-vlm passes it on, a string, and its ids: a finished string no longer shows what was typed.

    Attributes:
        ids: with one placeholder for each picture; typed `<IMG_CONTEXT>` or `<|im_end|>` is plain text among them.
    """

    ids: list[int]


def own_message(message: Any) -> Any:
    """mlx-vlm writes a text part's text twice, also as `content`."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    twice = [isinstance(part, dict) and part.get("text") == part.get("content") for part in message["content"]]
    parts = [
        {name: value for name, value in part.items() if name != "content"} if double else part
        for part, double in zip(message["content"], twice, strict=True)
    ]
    return {**message, "content": parts}


class MonoInternVLMLXProcessor(Processor):  # type: ignore[misc]
    """The processor as mlx-vlm calls it."""

    # Found by its name: saving it writes no code.
    _auto_class = None

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):  # type: ignore[no-untyped-def]
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.tokenizer = chat_tokenizer(tokenizer)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):  # type: ignore[no-untyped-def]
        """As the processor's own, without what mlx-vlm passes to model and processor alike."""
        return super().from_pretrained(*args, **{k: v for k, v in kwargs.items() if k not in LOAD_OPTIONS})

    def apply_chat_template(  # type: ignore[no-untyped-def,override]
        self, conversation, *, tokenize=False, enable_thinking=False, video=None, fps=None, **kwargs
    ):
        """As the processor's own; a rendered chat keeps its ids.

        mlx-vlm passes `enable_thinking`, `video` and its `fps` to every model.

        Raises:
            ValueError: this one has no thinking mode and takes no videos.
        """
        if enable_thinking or video is not None:
            raise ValueError(f"{'enable_thinking' if enable_thinking else 'video'}: not a thing of this model")
        conversation = [own_message(message) for message in conversation]
        rendered = super().apply_chat_template(conversation, tokenize=tokenize, **kwargs)
        if tokenize or not isinstance(rendered, str):
            return rendered
        chat = RenderedChat(rendered)
        chat.ids = self.chat_token_ids(conversation, **kwargs)
        return chat

    def __call__(  # type: ignore[no-untyped-def,override]
        self,
        images=None,
        text=None,
        *,
        max_tiles: int | None = None,
        min_tiles: int | None = None,
        use_thumbnail: bool | None = None,
        padding: Any = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` int64 [B, T]; with pictures `pixel_values` [tiles, P, 3*2p*2p]. numpy arrays.

        The options are named because mlx-vlm passes only those that are: `generate(.., max_tiles=6)`.
        """
        options = {"max_tiles": max_tiles, "min_tiles": min_tiles, "use_thumbnail": use_thumbnail}
        options = {name: value for name, value in options.items() if value is not None}
        texts: Any = [text] if isinstance(text, str) else text
        if texts is None or not any(isinstance(prompt, RenderedChat) for prompt in texts):
            return super().__call__(images, text, padding=True, return_tensors="np", **options)
        if not all(isinstance(prompt, RenderedChat) for prompt in texts):
            raise ValueError("rendered chats and other strings in one call; give them apart")
        pictures = [] if images is None else images if isinstance(images, list) else [images]
        place, rows, pixels = self.image_token_id, [], []
        counts = [prompt.ids.count(place) for prompt in texts]
        if sum(counts) != len(pictures):
            raise ValueError(f"{sum(counts)} places in the chats for {len(pictures)} pictures; they must match")
        for prompt, count in zip(texts, counts, strict=True):
            own, pictures = pictures[:count], pictures[count:]
            tokens: Iterator[int] = iter(())
            if own:
                features = self.image_processor(own, return_tensors="np", **self.share_tiles(options, count))
                pixels.append(features["pixel_values"])
                tokens = iter(int(tiles) * self.tokens_per_tile for tiles in features["num_tiles"])
            rows.append([token for id in prompt.ids for token in [id] * (next(tokens) if id == place else 1)])
        data = self.tokenizer.pad({"input_ids": rows}, padding=True, padding_side=padding_side, return_tensors="np")
        return BatchFeature({**data, **({"pixel_values": np.concatenate(pixels)} if pixels else {})})


class ChatTokenizer:
    """Mixed into the folder's tokenizer, which mlx-vlm calls itself for prompts without pictures."""

    def __call__(self, text=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        texts: Any = [text] if isinstance(text, str) else text
        if not texts or not all(isinstance(prompt, RenderedChat) for prompt in texts):
            if texts and kwargs.get("add_special_tokens", True):
                begun = self.bos_token or ""  # type: ignore[attr-defined]
                plain = [prompt.removeprefix(begun) for prompt in texts]  # the tokenizer puts it in front
                text = plain[0] if isinstance(text, str) else plain
            return super().__call__(text, *args, **kwargs)  # type: ignore[misc]
        rows = [prompt.ids for prompt in texts]
        side = kwargs.get("padding_side")
        return self.pad({"input_ids": rows}, padding=True, padding_side=side, return_tensors="np")  # type: ignore[attr-defined]


def chat_tokenizer(tokenizer: Any) -> Any:
    """A new object of a subclass with the state of the one given; it is saved under the same class name."""
    kind = type(tokenizer)
    made: Any = object.__new__(type(kind.__name__, (ChatTokenizer, kind), {"__module__": __name__}))
    vars(made).update(vars(tokenizer))
    return made


class MonoInternVLMLXConfig(PreTrainedConfig):
    """What transformers looks a processor up by."""

    model_type = MODEL_TYPE


AutoProcessor.register(MonoInternVLMLXConfig, MonoInternVLMLXProcessor, exist_ok=True)
MODEL_CONFIG.setdefault(MODEL_TYPE, MessageFormat.LIST_WITH_IMAGE_FIRST)
