"""What the two files say beside their tensors: what the model is, how it is asked, how a picture is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
from gguf.utility import size_label

from .. import __version__
from ..configuration_mono_internvl import PATCHES_PER_TOKEN_SIDE, MonoInternVLConfig
from ..conversion.files import TAGS
from ..conversion.source import Origin
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..processing_mono_internvl import MonoInternVLProcessor
from .gguf_template import gguf_template
from .gguf_tensors import architecture, hidden_channels
from .gguf_vocabulary import gguf_vocabulary


# What ends an answer, in the order in which llama.cpp has places for it.
_STOPS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Identity:
    """Who the model is: its name, where it came from and what its card says (`license` and the like)."""

    name: str
    origin: Origin
    card: dict[str, Any]

    def write(self, writer: GGUFWriter, kind: str, file_type: LlamaFileType, counts: tuple[int, int]) -> None:
        """`general.*`. `counts`: parameters outside of experts, and of one expert."""
        writer.add_type(kind)
        writer.add_name(self.name)
        if counts[1]:
            writer.add_size_label(size_label(counts[0] + 2 * counts[1], counts[0], counts[1], 2))
        else:
            writer.add_size_label(size_label(counts[0], counts[0], 0, 0))
        writer.add_license(str(self.card.get("license", "unknown")))
        for key, add in (("license_name", writer.add_license_name), ("license_link", writer.add_license_link)):
            if key in self.card:
                add(str(self.card[key]))
        if self.origin.hub_id is not None:
            owner, _, name = self.origin.hub_id.partition("/")
            url = f"https://huggingface.co/{self.origin.hub_id}"
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, name)
            writer.add_base_model_organization(0, owner)
            writer.add_base_model_repo_url(0, url + (f"/tree/{self.origin.commit}" if self.origin.commit else ""))
        writer.add_tags([*TAGS, "image-text-to-text"])
        writer.add_description(f"Mono-InternVL, made by mono-internvl {__version__} export gguf")
        writer.add_file_type(int(file_type))
        writer.add_quantization_version(GGML_QUANT_VERSION)


def write_text_metadata(
    writer: GGUFWriter, config: MonoInternVLConfig, processor: MonoInternVLProcessor, stops: list[int]
) -> None:
    """Dimensions, tokenizer, template and stop tokens of the decoder.

    Raises:
        ValueError: the tokenizer, the template or the stop tokens cannot be held.
    """
    text, channels = config.text_config, hidden_channels(config)
    routed = architecture(config) == "llama"
    writer.add_block_count(text.num_hidden_layers)
    # Where dynamic NTK, which llama.cpp lacks, would begin: up to here both rotate alike.
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(channels)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads if routed else text.num_attention_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps * text.hidden_size / channels)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_vocab_size(text.vocab_size)
    if routed:
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
    _write_tokenizer(writer, config, processor, stops)


def _write_tokenizer(
    writer: GGUFWriter, config: MonoInternVLConfig, processor: MonoInternVLProcessor, stops: list[int]
) -> None:
    tokenizer = processor.tokenizer
    vocabulary = gguf_vocabulary(tokenizer, config.text_config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if len(stops) > len(_STOPS):
        named = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)})" for token in stops)
        raise ValueError(f"GGUF has places for {len(_STOPS)} stop tokens, this model has {len(stops)}: {named}")
    for role, token in zip(_STOPS, stops, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    for role, token in (
        ("bos", tokenizer.bos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    # Read and never generated, as `generate` has it. llama.cpp looks for int32.
    writer.add_array("tokenizer.ggml.suppress_tokens", config.image_token_ids)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    template = processor.chat_template
    if not isinstance(template, str):
        raise ValueError("the processor has no single chat template: GGUF holds one")
    writer.add_chat_template(gguf_template(template))


def write_vision_metadata(
    writer: GGUFWriter, config: MonoInternVLConfig, image_processor: MonoInternVLImageProcessor
) -> None:
    """Dimensions of the visual embedding, and the limits and normalisation of tiles."""
    vision = config.vision_config
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("internvl")
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(image_processor.tile_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_projection_dim(hidden_channels(config))
    writer.add_vision_projector_scale_factor(PATCHES_PER_TOKEN_SIDE)
    # There are no layers in front of the projector; what would describe them must be there all the same.
    writer.add_vision_block_count(0)
    writer.add_vision_head_count(1)
    writer.add_vision_feed_forward_length(4 * vision.hidden_size)
    writer.add_vision_attention_layernorm_eps(1e-6)
    own = image_processor.do_normalize
    writer.add_vision_image_mean(image_processor.image_mean if own else vision.image_mean)
    writer.add_vision_image_std(image_processor.image_std if own else vision.image_std)
    writer.add_uint32("clip.vision.preproc_min_tiles", image_processor.min_tiles)
    writer.add_uint32("clip.vision.preproc_max_tiles", image_processor.tile_limit())
