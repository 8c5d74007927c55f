"""Converting between the official layout and ours, tensor for tensor and bit for bit."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..common.files import read_json
from ..compat_mono_internvl import IN_FLOAT16
from ..configuration_mono_internvl import MonoInternVLConfig
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..processing_mono_internvl import MonoInternVLProcessor
from ..processor_loading_mono_internvl import load_image_processor
from ..tiling_mono_internvl import AUTO
from ..weight_mapping_mono_internvl import beyond_official
from .files import (
    copy_licences,
    make_tokenizer_config_portable,
    save_native_config,
)
from .job import Job, Report
from .plan import EMBEDDING, layout_name, plan_native, plan_official
from .source import MONO_INTERNVL, Checkpoint, encoder_tensor, find_source, vision_kind
from .tokenizer import has_tokenizer, warn_without_tokenizer
from .verify import Differences, NativeView, compare_layouts
from .writer import Progress, check_destination, expand_user, parse_size, write_json


logger = logging.getLogger(__name__)

LAYOUTS = ("official", "native")
# Code of the official layout lives in its own repository.
_OFFICIAL_CODE = "OpenGVLab/Mono-InternVL-2B--"
_OFFICIAL_ROPES = ("default", "linear", "dynamic")
# Called alike in `llm_config` and in our `text_config`.
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    max_shard_size: int | str = "1GB",
    image_token_id: int | None = None,
    base_model: str | None = None,
    verify: bool = True,
    manifest: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a Mono-InternVL in the other layout; dtypes and values are kept.

    Args:
        source, destination, max_shard_size, base_model, verify, manifest, progress: as for `expand_checkpoint`.
        to: `official` (OpenGVLab/Mono-InternVL-2B's) or `native` (ours).
        image_token_id: of an official source whose nine tokens are not its last ids.

    Raises:
        ValueError: as for `expand_checkpoint`; also a source that is in that layout already, and, for the official
            layout, what it has no place for (visual attention experts, a head size of its own).
        FileExistsError, FileNotFoundError, OSError: as for `expand_checkpoint`.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to={to!r} is not one of {', '.join(LAYOUTS)}")
    parse_size(max_shard_size)
    destination = expand_user(destination)
    check_destination(destination)
    folder, origin = find_source(source)
    config = read_config(folder, image_token_id, "convert")
    with Checkpoint(folder) as given:
        layout = layout_of(given)
        if layout == to:
            raise ValueError(f"{folder} is in the {to} layout already")
        if to == "official":
            _check_official_can_hold(config, folder)
        plan = plan_native(config, given, layout) if to == "native" else plan_official(config, given)
        config.dtype = given.tensors[layout_name(EMBEDDING, layout)].dtype
        if halves := [name for name, info in given.tensors.items() if info.dtype == torch.float16]:
            logger.warning(
                "%d of %d tensors of %s are %s; they stay so: load the result with dtype bfloat16 or float32",
                len(halves),
                len(given.tensors),
                folder,
                IN_FLOAT16,
            )

        def write_files(target: Path) -> None:
            if to == "native":
                save_native_config(config, target)
            else:
                write_json(target / "config.json", official_config(config, load_image_processor(str(folder))))
            _copy_processor(folder, target, to)
            if (folder / "generation_config.json").is_file():
                shutil.copyfile(folder / "generation_config.json", target / "generation_config.json")
            copy_licences(folder, target)

        def compare(made: Checkpoint) -> Differences:
            return compare_layouts(NativeView(given, layout, config), NativeView(made, to, config))

        how = f"The Mono-InternVL {{source}} in the {to} layout, made by `mono-internvl convert`; no value was changed"
        options = {"to": to, "image_token_id": config.image_token_id, "base_model": base_model}
        job = Job("convert", how, options, origin, given, config, plan, base_model, manifest)
        return job.run(destination, write_files, compare if verify else None, max_shard_size, progress)


def read_config(folder: Path, image_token_id: int | None, command: str) -> MonoInternVLConfig:
    """The configuration of a folder that `command` (for the message) was given.

    Raises:
        ValueError: it is no Mono-InternVL's, or damaged; names the file.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    described = vision_kind(values)
    if kind not in ("mono_internvl", "internvl_chat") or described != MONO_INTERNVL:
        described = described or f"of the architecture {(values.get('architectures') or [kind])[0]}"
        raise ValueError(f"{folder} is {described}; {command} takes a Mono-InternVL in the official layout or ours")
    text = values.get("llm_config" if kind == "internvl_chat" else "text_config")
    if not isinstance(text, dict) or not isinstance(text.get("num_key_value_heads"), int):
        raise ValueError(f"{path}: num_key_value_heads of the language model must be given as a whole number")
    chosen: dict[str, Any] = {} if image_token_id is None else {"image_token_id": image_token_id}
    try:
        return MonoInternVLConfig.from_pretrained(folder, **chosen)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def layout_of(given: Checkpoint) -> str:
    """official or native, by its names.

    Raises:
        ValueError: neither.
    """
    if name := encoder_tensor(given):
        raise ValueError(
            f"{given.tensors[name].file} holds {name}: the vision tower of a modular InternVL, "
            "which Mono-InternVL does not have"
        )
    for layout in LAYOUTS:
        if layout_name(EMBEDDING, layout) in given.tensors:
            return layout
    names = " nor ".join(layout_name(EMBEDDING, layout) for layout in LAYOUTS)
    raise ValueError(f"{given.folder} holds neither {names}: it is in neither layout")


def _copy_processor(folder: Path, target: Path, to: str) -> None:
    if not has_tokenizer(folder):
        warn_without_tokenizer(folder)
        if to == "native":
            image_processor: MonoInternVLImageProcessor = load_image_processor(str(folder))
            image_processor.save_pretrained(target)
        return
    processor = MonoInternVLProcessor.from_pretrained(folder)
    if to == "native":
        processor.save_pretrained(target)
        return
    processor.tokenizer.save_pretrained(target)
    make_tokenizer_config_portable(target)


def _check_official_can_hold(config: MonoInternVLConfig, folder: Path) -> None:
    text = config.text_config
    if found := beyond_official(config):
        raise ValueError(f"{folder} has {', '.join(found)}: the official layout has no place for it")
    kind = text.rope_parameters.get("rope_type", "default")
    if kind not in _OFFICIAL_ROPES:
        raise ValueError(
            f"{folder}: the official layout's code knows no rope type {kind} (only {', '.join(_OFFICIAL_ROPES)})"
        )
    if text.head_dim * text.num_attention_heads != text.hidden_size:
        raise ValueError(
            f"{folder}: head_dim={text.head_dim} is not hidden_size / num_attention_heads "
            f"({text.hidden_size} / {text.num_attention_heads}), the only head size of the official layout"
        )


def official_config(config: MonoInternVLConfig, image_processor: MonoInternVLImageProcessor) -> dict[str, Any]:
    """The official `config.json`: the keys that the released code, engines and frameworks read."""
    if image_processor.max_tiles == AUTO:
        logger.warning(
            'max_tiles="auto" has no place in the official layout: max_dynamic_patch is %d, which also enlarges small '
            "pictures",
            image_processor.tile_limit(),
        )
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    dtype = str(config.dtype).removeprefix("torch.")
    llm = {
        "architectures": ["InternLM2VEForCausalLM"],
        "attn_implementation": "eager",
        "bias": text.attention_bias,
        "model_type": "internlm2",
        "rope_scaling": None
        if rope.get("rope_type", "default") == "default"
        else {"type": rope["rope_type"], "factor": rope["factor"]},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": dtype,
    }
    llm |= {name: getattr(text, name) for name in _SHARED_KEYS}
    code = {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    }
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {name: _OFFICIAL_CODE + target for name, target in code.items()},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size,
        "image_end_token_id": config.image_end_token_id,
        "image_start_token_id": config.image_start_token_id,
        "image_token_id": config.image_token_id,
        "llm_config": dict(sorted(llm.items())),
        "max_dynamic_patch": image_processor.tile_limit(),
        "min_dynamic_patch": image_processor.min_tiles,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "stop_token_ids": config.stop_token_ids,
        "template": "internlm2-chat",
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": image_processor.use_thumbnail,
        "vision_config": {
            "architectures": ["InternVisionPatchModel"],
            "hidden_size": vision.hidden_size,
            "image_mean": vision.image_mean,
            "image_size": vision.image_size,
            "image_std": vision.image_std,
            "initializer_range": vision.initializer_range,
            "model_type": "intern_vit_patch",
            "num_channels": vision.num_channels,
            "patch_size": vision.patch_size,
            "torch_dtype": dtype,
            "use_flash_attn": False,
        },
    }
