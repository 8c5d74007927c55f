"""Matrix-product FLOPs and bytes by closed formula; the tests hold them to what torch counts.

A product [rows, inputs] x [inputs, outputs] is 2 * rows * inputs * outputs. Attention of a causal prompt of T tokens
is counted at the T (T + 1) / 2 pairs that are needed, or at all T * S pairs where `causal=False`.
"""

from typing import Any


def attention_width(text: Any) -> tuple[int, int]:
    """Channels of all query heads, and of all key (or value) heads."""
    return text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim


def layer_weights(text: Any) -> tuple[int, int]:
    """Parameters in products of one layer that a token meets: attention, and one expert."""
    width, kv_width = attention_width(text)
    return 2 * text.hidden_size * (width + kv_width), 3 * text.hidden_size * text.intermediate_size


def product_shapes(text: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of a text model's products."""
    hidden, (width, kv_width) = text.hidden_size, attention_width(text)
    return [
        (hidden, width),
        (hidden, kv_width),
        (hidden, text.intermediate_size),
        (text.intermediate_size, hidden),
        (hidden, text.vocab_size),
    ]


def visual_embedding_flops(config: Any, visual: int) -> int:
    """Patch embedding and projector for `visual` tokens."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    channels = 4 * vision.hidden_size
    return 2 * visual * (3 * vision.patch_size**2 * channels + channels * hidden + hidden * hidden)


def decoder_flops(
    text: Any,
    queries: int,
    *,
    past: int = 0,
    keep: int | None = None,
    experts: int = 1,
    causal: bool = True,
    skips: bool = True,
) -> int:
    """Layers and output head for one sequence.

    Args:
        queries: tokens of this call, after `past` cached ones.
        keep: logits are made of so many last positions; None: of all.
        experts: experts that each token passes through: 1, or 2 for the released formula.
        skips: the last layer computes only what `keep` needs.
    """
    attention, expert = layer_weights(text)
    width, kv_width = attention_width(text)
    kept = queries if keep is None else keep

    def pairs(rows: int) -> int:
        first = past + queries - rows
        return sum(range(first + 1, first + rows + 1)) if causal else rows * (past + queries)

    whole = 2 * queries * (attention + experts * expert) + 4 * width * pairs(queries)
    last = whole
    if skips and kept < queries:
        last = (
            2 * queries * 2 * text.hidden_size * kv_width
            + 2 * kept * (2 * text.hidden_size * width + expert)
            + 4 * width * pairs(kept)
        )
    return (text.num_hidden_layers - 1) * whole + last + 2 * kept * text.hidden_size * text.vocab_size


def prefill_flops(config: Any, tokens: int, visual: int, **options: Any) -> int:
    """A prompt of `tokens`, `visual` of them from pictures; options as for `decoder_flops`."""
    return decoder_flops(config.text_config, tokens, **options) + visual_embedding_flops(config, visual)


def vision_tower_flops(vision: Any, tiles: int, hidden: int) -> int:
    """The modular twin's InternViT and its projector into `hidden` channels, for tiles of `vision.image_size`."""
    side, channels = vision.image_size[0] // vision.patch_size[0], vision.hidden_size
    tokens = side**2 + 1
    layer = 2 * tokens * (4 * channels**2 + 2 * channels * vision.intermediate_size) + 4 * channels * tokens**2
    patches = 2 * side**2 * 3 * vision.patch_size[0] ** 2 * channels
    projector = 2 * (side**2 // 4) * (4 * channels * hidden + hidden**2)
    return tiles * (vision.num_hidden_layers * layer + patches + projector)


def modular_flops(config: Any, vision: Any, tokens: int, tiles: int, **options: Any) -> int:
    """The modular twin's prompt: its vision tower, and a decoder that does the last layer wholly."""
    text = config.text_config
    return decoder_flops(text, tokens, **{**options, "skips": False}) + vision_tower_flops(
        vision, tiles, text.hidden_size
    )


def decode_bytes(text: Any, cache_length: int, bytes_per_value: int) -> int:
    """Bytes that one step must read: the text path without the embedding table, and the cache."""
    attention, expert = layer_weights(text)
    norms = (2 * text.num_hidden_layers + 1) * text.hidden_size
    weights = text.num_hidden_layers * (attention + expert) + norms + text.hidden_size * text.vocab_size
    cache = 2 * text.num_hidden_layers * attention_width(text)[1] * cache_length
    return bytes_per_value * (weights + cache)


def training_flops(config: Any, sample_lengths: list[int], visual: int, targets: int) -> int:
    """Forward and backward (3 x forward) of packed samples, attention within each sample only.

    Args:
        visual: visual tokens of all samples.
        targets: positions of all samples that have a target: logits are made of them alone.
    """
    text = config.text_config
    layers = sum(decoder_flops(text, length, keep=0, skips=False) for length in sample_lengths)
    head = 2 * targets * text.hidden_size * text.vocab_size
    return 3 * (layers + head + visual_embedding_flops(config, visual))
