"""The official checkpoint layout <-> ours, applied by transformers while it loads and saves.

    official (OpenGVLab/Mono-InternVL-2B)                       ours
    vision_model.embeddings.*                                   model.vision_embeddings.*
    mlp1.{0,1,3}.*                                              model.multi_modal_projector.*
                                                                    {layer_norm, linear_1, linear_2}
    language_model.model.tok_embeddings / norm                  model.language_model.embed_tokens / norm
    language_model.model.layers.N.                              model.language_model.layers.N.
        attention.wqkv  (regrouped)                                 self_attn.{q,k,v}_proj
        attention.wo                                                self_attn.o_proj
        attention_norm, ffn_norm                                    input_layernorm, post_attention_layernorm
        feed_forward.{w1,w3,w2}                                     mlp.{gate,up,down}_proj
        feed_forward_ve.{w1,w3,w2}                                  visual_mlp.{gate,up,down}_proj
    language_model.output                                       lm_head

Keys already in our layout match no pattern and pass through, so one class loads both. Patterns are disjoint and
anchored: transformers applies them backwards on saving, where a catch-all would swallow another's keys.
"""

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming


def additions(config) -> list[str]:  # type: ignore[no-untyped-def]
    """What a configuration has that neither the released model nor 1.5 has, in words."""
    text = config.get_text_config()
    found = [f"attention_bias {text.attention_bias!r}"] if isinstance(text.attention_bias, str) else []
    found += [name for name in ("mlp_bias", "qk_norm", "expert_gates") if getattr(text, name)]
    queries = getattr(config, "num_learnable_queries", 0)
    return [*found, f"{queries} learnable queries"] if queries else found


def beyond_official(config) -> list[str]:  # type: ignore[no-untyped-def]
    """What a configuration has that the official layout has no place for, in words."""
    experts = config.get_text_config().visual_attention_experts
    return [*([] if experts == "none" else [f"visual attention experts ({experts})"]), *additions(config)]


def grouped_rows(heads: int, kv_heads: int, head_dim: int) -> int:
    """Rows of InternLM2's grouped `wqkv`."""
    return (heads + 2 * kv_heads) * head_dim


def split_grouped_qkv(wqkv: torch.Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """InternLM2's grouped `wqkv` [kv_heads * (G + 2) * head_dim, ...] -> (q, k, v), G = heads / kv_heads.

    Each of the kv_heads blocks holds G query heads, then its key head, then its value head (arXiv 2403.17297).
    Works on weights [rows, in] and biases [rows].
    """
    groups, expected = heads // kv_heads, grouped_rows(heads, kv_heads, head_dim)
    if wqkv.shape[0] != expected:
        raise ValueError(
            f"wqkv has {wqkv.shape[0]} rows; {heads} heads, {kv_heads} kv heads of {head_dim} need {expected}"
        )
    blocks = wqkv.reshape(kv_heads, groups + 2, head_dim, *wqkv.shape[1:])
    q, k, v = blocks[:, :groups], blocks[:, groups], blocks[:, groups + 1]
    return tuple(part.reshape(-1, *wqkv.shape[1:]).contiguous() for part in (q, k, v))


def merge_grouped_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, kv_heads: int, head_dim: int
) -> torch.Tensor:
    """The inverse of `split_grouped_qkv`."""
    groups, rest = heads // kv_heads, q.shape[1:]
    parts = (
        q.reshape(kv_heads, groups, head_dim, *rest),
        k.reshape(kv_heads, 1, head_dim, *rest),
        v.reshape(kv_heads, 1, head_dim, *rest),
    )
    return torch.cat(parts, dim=1).reshape(-1, *rest).contiguous()


def _head_layout(config) -> dict[str, int]:  # type: ignore[no-untyped-def]
    text = config.get_text_config()
    return {"heads": text.num_attention_heads, "kv_heads": text.num_key_value_heads, "head_dim": text.head_dim}


def _only_tensor(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value


class SplitGroupedQKV(ConversionOps):
    """Loading: one grouped `wqkv` becomes `q_proj`, `k_proj` and `v_proj`."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):  # type: ignore[no-untyped-def,override]
        (wqkv,) = (_only_tensor(value) for value in input_dict.values())
        layout = _head_layout(config)
        if wqkv.shape[0] != grouped_rows(**layout):
            # It fits nothing then, and is reported with its shape among the mis-shaped weights.
            return dict.fromkeys(target_patterns, wqkv[None])
        return dict(zip(target_patterns, split_grouped_qkv(wqkv, **layout), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return MergeGroupedQKV()


class MergeGroupedQKV(ConversionOps):
    """Saving in the official layout: `q_proj`, `k_proj`, `v_proj` become one grouped `wqkv`."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):  # type: ignore[no-untyped-def,override]
        q, k, v = (_only_tensor(input_dict[pattern]) for pattern in source_patterns)
        (target,) = target_patterns
        return {target: merge_grouped_qkv(q, k, v, **_head_layout(config))}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitGroupedQKV()


class SplittingConverter(WeightConverter):
    """Quantises what it splits one by one: torchao's operation takes one tensor of a conversion and drops the rest."""

    __slots__ = ()

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):  # type: ignore[no-untyped-def,override]
        tensors = super().convert(layer_name, model=model, config=config, loading_info=loading_info)
        if hf_quantizer is None or self.quantization_operation is None:
            return tensors
        shared = {"model": model, "config": config, "missing_keys": loading_info.missing_keys if loading_info else None}
        quantized: dict = {}
        for name, tensor in tensors.items():
            quantized |= self.quantization_operation.convert({name: tensor}, full_layer_name=name, **shared)
        return quantized


_FFN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# (official, ours): regular expressions without groups, so that each side can serve as the pattern and as the text.
RENAMINGS: tuple[tuple[str, str], ...] = (
    (r"^vision_model\.embeddings\.", r"^model\.vision_embeddings\."),
    (r"^mlp1\.0\.", r"^model\.multi_modal_projector\.layer_norm\."),
    (r"^mlp1\.1\.", r"^model\.multi_modal_projector\.linear_1\."),
    (r"^mlp1\.3\.", r"^model\.multi_modal_projector\.linear_2\."),
    (r"^language_model\.model\.tok_embeddings\.", r"^model\.language_model\.embed_tokens\."),
    (r"^language_model\.model\.norm\.", r"^model\.language_model\.norm\."),
    (r"^language_model\.model\.layers\.", r"^model\.language_model\.layers\."),
    (r"^language_model\.output\.", r"^lm_head\."),
    (r"\.attention_norm\.", r"\.input_layernorm\."),
    (r"\.ffn_norm\.", r"\.post_attention_layernorm\."),
    (r"\.attention\.wo\.", r"\.self_attn\.o_proj\."),
    *((rf"\.feed_forward\.{w}\.", rf"\.mlp\.{name}\.") for w, name in _FFN.items()),
    *((rf"\.feed_forward_ve\.{w}\.", rf"\.visual_mlp\.{name}\.") for w, name in _FFN.items()),
)


def checkpoint_mapping() -> list[WeightRenaming | WeightConverter]:
    """The conversion list in transformers' terms."""
    renamings = [WeightRenaming(source, target) for source, target in RENAMINGS]
    converters = [
        SplittingConverter(
            f".attention.wqkv.{kind}",
            [f".self_attn.{part}_proj.{kind}" for part in "qkv"],
            operations=[SplitGroupedQKV()],
        )
        for kind in ("weight", "bias")
    ]
    return [*renamings, *converters]


def register_checkpoint_mapping(model_type: str) -> None:
    """Tell transformers about the official layout (again: remote code is imported anew under each hash)."""
    register_checkpoint_conversion_mapping(model_type, checkpoint_mapping(), overwrite=True)
