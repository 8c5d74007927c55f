"""A Mono-InternVL -> `model.gguf` and `mmproj.gguf` for llama.cpp and all that embeds it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from huggingface_hub.repocard import metadata_load
from transformers import GenerationConfig

from .. import __version__
from ..common.engines import refuse_additions
from ..configuration_mono_internvl import MonoInternVLConfig
from ..conversion.convert import layout_of, read_config
from ..conversion.plan import EMBEDDING
from ..conversion.source import Checkpoint, find_source
from ..conversion.tokenizer import has_tokenizer
from ..conversion.writer import Progress, check_destination, expand_user, job_key, publish_folder, temporary_folder
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import check_positive
from .gguf_files import write_gguf
from .gguf_metadata import Identity, write_text_metadata, write_vision_metadata
from .gguf_tensors import COGVLM_THETA, GgufTensor, Weights, architecture, text_tensors, vision_tensors
from .report import GgufReport


logger = logging.getLogger(__name__)

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
_OWN_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def export(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    kind: str,
    *,
    name: str | None,
    max_tiles: int | None,
    image_token_id: int | None,
    repaired_cogvlm: bool,
    progress: Progress | None,
) -> GgufReport:
    """See `export_gguf`."""
    destination = expand_user(destination)
    check_destination(destination)
    folder, origin = find_source(source)
    config = read_config(folder, image_token_id, "export")
    refuse_additions(config, f"{folder}: llama.cpp")
    with Checkpoint(folder) as given:
        weights = Weights(given, layout_of(given), config)
        if kind == "auto":
            kind = _OWN_TYPES.get(weights.dtype(EMBEDDING), "f32")
        _check_can_hold(config, folder, kind, repaired_cogvlm)
        if not has_tokenizer(folder):
            raise FileNotFoundError(f"{folder} has no tokenizer, which a GGUF file holds")
        processor = MonoInternVLProcessor.from_pretrained(folder)
        if max_tiles is not None:
            images = processor.image_processor
            check_positive("max_tiles", max_tiles)
            # As in a call of the image processor: a lower limit lowers the other one too.
            images.min_tiles, images.max_tiles = min(images.min_tiles, max_tiles), max_tiles
        _check_processor(processor, config, folder)
        if kind == "f16":
            logger.warning(
                "llama.cpp multiplies float16 weights with float16 activations, which overflow in the released model: "
                "bf16 and q8_0 do not"
            )
        type_ = GGMLQuantizationType[kind.upper()]
        files = {
            MMPROJ: vision_tensors(config, weights, processor.image_processor.tile_size),
            MODEL: text_tensors(config, weights, type_),
        }
        identity = Identity(name or origin.name, origin, _card(folder))
        writers = {MODEL: GGUFWriter(None, architecture(config)), MMPROJ: GGUFWriter(None, "clip")}
        for file, tensors in files.items():
            file_type = _file_type(kind) if file == MODEL else LlamaFileType.ALL_F32
            identity.write(writers[file], "model" if file == MODEL else "mmproj", file_type, _counts(tensors))
        write_text_metadata(writers[MODEL], config, processor, _stops(config, processor, folder))
        write_vision_metadata(writers[MMPROJ], config, processor.image_processor)
        start = time.monotonic()
        key = job_key(given, __version__, "export gguf", kind, name, max_tiles, config.to_json_string())
        _write(destination, key, writers, files, progress)
    sizes = {file: (destination / file).stat().st_size for file in (MODEL, MMPROJ)}
    tensors_in_all = sum(len(tensors) for tensors in files.values())
    return GgufReport(destination, sizes, tensors_in_all, kind, architecture(config), time.monotonic() - start)


def _write(
    destination: Path,
    key: str,
    writers: dict[str, GGUFWriter],
    files: dict[str, list[GgufTensor]],
    progress: Progress | None,
) -> None:
    """Both files, or neither: they are made in a folder that is renamed, and removed where anything fails."""
    total, done = sum(tensor.nbytes for tensors in files.values() for tensor in tensors), 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        if progress is not None:
            progress(done, total)

    with temporary_folder(destination, key, total) as folder:
        try:
            for file, tensors in files.items():
                if spoilt := write_gguf(writers[file], folder / file, tensors, count):
                    logger.warning("%d tensors hold NaN or infinite values: %s", len(spoilt), ", ".join(spoilt))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        publish_folder(folder, destination)


# ----------------------------------------------------------------------------------------------------- what can be held


def _check_can_hold(config: MonoInternVLConfig, folder: Path, kind: str, repaired_cogvlm: bool) -> None:
    """Refuse, by name, what llama.cpp has no place for.

    Raises:
        ValueError: says what, and what is allowed.
    """
    text, cogvlm = config.text_config, architecture(config) == "cogvlm"
    if text.hidden_act != "silu":
        raise ValueError(
            f"{folder}: llama.cpp's feed-forward is silu here, this model's hidden_act is {text.hidden_act}"
        )
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    rows = {"hidden_size": text.hidden_size} if cogvlm else {}
    rows |= {"intermediate_size": text.intermediate_size}
    rows |= {"num_attention_heads * head_dim": text.num_attention_heads * text.head_dim}
    for what, width in rows.items():
        if width % block:
            raise ValueError(f"{folder}: {kind} holds rows of a multiple of {block} values, and {what} is {width}")
    if not cogvlm:
        return
    start = f"{folder} has visual attention experts ({config.visual_attention_experts}), and llama.cpp's graph for them"
    rope = text.rope_parameters["rope_type"], float(text.rope_parameters["rope_theta"])
    if text.attention_bias:
        raise ValueError(f"{start} has no place for the biases of attention (attention_bias)")
    if text.num_attention_heads * text.head_dim != text.hidden_size:
        raise ValueError(
            f"{start} takes heads that are as wide as the hidden state together: num_attention_heads * head_dim is "
            f"{text.num_attention_heads} * {text.head_dim}, hidden_size {text.hidden_size}"
        )
    if rope[0] not in ("default", "dynamic"):
        raise ValueError(f"{start} knows no rope type {rope[0]} (only default, and dynamic within its context)")
    if rope[1] != COGVLM_THETA and not repaired_cogvlm:
        raise ValueError(
            f"{start} rotates with theta {COGVLM_THETA:g} whatever the file says, this model with {rope[1]:g}: its "
            "answers would be wrong. For a llama.cpp that is repaired (docs/local.md), pass --repaired-cogvlm"
        )


def _check_processor(processor: MonoInternVLProcessor, config: MonoInternVLConfig, folder: Path) -> None:
    """Raise ValueError for a way to cut pictures that llama.cpp does not know, or ids that are another vocabulary's."""
    images = processor.image_processor
    if not images.use_thumbnail and images.tile_limit() > 1:
        raise ValueError(
            f"{folder}: llama.cpp always adds a thumbnail to several tiles, this model's processor does not "
            "(use_thumbnail=False)"
        )
    if images.tile_size % config.vision_config.token_size:
        raise ValueError(
            f"{folder}: tiles of {images.tile_size} px are no multiple of {config.vision_config.token_size}"
        )
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{folder}: <IMG_CONTEXT> is token {processor.image_token_id} of its tokenizer, but the model looks for "
            f"{config.image_token_id}; pass --image-token-id {processor.image_token_id}"
        )


def _stops(config: MonoInternVLConfig, processor: MonoInternVLProcessor, folder: Path) -> list[int]:
    """Every token that ends an answer, by the tokenizer, config.json or generation_config.json."""
    ends: list[Any] = [*processor.stop_token_ids, config.text_config.eos_token_id, config.stop_token_ids]
    if (folder / "generation_config.json").is_file():
        ends.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    flat = [token for end in ends for token in (end if isinstance(end, list) else [end])]
    return list(dict.fromkeys(token for token in flat if token is not None))


# ---------------------------------------------------------------------------------------------------------- small facts


def _card(folder: Path) -> dict[str, Any]:
    readme = folder / "README.md"
    return (metadata_load(readme) or {}) if readme.is_file() else {}


def _file_type(kind: str) -> LlamaFileType:
    return LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"]


def _counts(tensors: list[GgufTensor]) -> tuple[int, int]:
    """Parameters outside of experts, and of one expert."""
    counts = {tensor.name: torch.Size(tensor.shape).numel() for tensor in tensors}
    experts = sum(count for name, count in counts.items() if "_exps." in name)
    return sum(counts.values()) - experts, experts // 2
