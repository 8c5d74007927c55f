"""A folder for mlx-vlm: weights under the names of `mlx_model.Model`, the model's code, tokenizer and configuration.

mlx-vlm runs the file that config.json calls `model_file`, so nothing has to be in mlx-vlm itself. Values are copied, or
converted to one dtype; names change, and a `wqkv` of the official layout is split. Weights are streamed, and the folder
gets its name when it is whole.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from .. import __version__
from ..common.engines import check_tokens, refuse_additions, stop_token_ids
from ..common.files import read_json, write_json
from ..compat_mono_internvl import IN_FLOAT16
from ..configuration_checks_mono_internvl import fields_of
from ..configuration_mono_internvl import MonoInternVLConfig
from ..conversion.convert import layout_of, read_config
from ..conversion.files import copy_licences
from ..conversion.plan import HEAD, Plan, plan_native
from ..conversion.source import Checkpoint, find_source
from ..conversion.tokenizer import has_tokenizer
from ..conversion.writer import (
    Progress,
    check_destination,
    expand_user,
    job_key,
    naming,
    parse_size,
    publish_folder,
    temporary_folder,
    write_shards,
)
from ..processing_mono_internvl import MonoInternVLProcessor


MODEL_FILE = "mlx_mono_internvl.py"
PROCESSOR_CLASS = "MonoInternVLMLXProcessor"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Ours -> MLX's, by how a name begins. The class token's embedding is in checkpoints, and nothing uses it.
_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_embeddings.": "vision_embeddings.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_UNUSED = "model.vision_embeddings.class_embedding"


class Exported(NamedTuple):
    """What was written: the folder, how many tensors in how many files, their bytes."""

    folder: Path
    tensors: int
    shards: int
    nbytes: int


def export_mlx(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "4GB",
    image_token_id: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a Mono-InternVL of either layout as a folder for mlx-vlm.

    Args:
        source: a folder or a Hub id.
        destination: a folder that is not there, or empty.
        dtype: bfloat16 or float32 for all weights; None keeps theirs.
        image_token_id: of an official source whose nine tokens are not its last ids.

    Raises:
        ValueError: not a Mono-InternVL, one that MLX's code cannot run (activation, float16, queries, gates), no
            tokenizer or one of other ids than the configuration's, an unknown dtype; names it.
        FileExistsError, FileNotFoundError, OSError: as for `conversion.convert_checkpoint`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    shard_bytes, destination = parse_size(max_shard_size), expand_user(destination)
    check_destination(destination)
    folder, _ = find_source(source)
    config = read_config(folder, image_token_id, "export")
    if config.text_config.hidden_act != "silu":
        raise ValueError(f"{folder}: hidden_act={config.text_config.hidden_act!r}, and the MLX code has silu alone")
    refuse_additions(config, "the MLX code")
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} has no tokenizer, without which mlx-vlm cannot use it")
    processor = MonoInternVLProcessor.from_pretrained(folder)
    check_tokens(config, processor, str(folder))
    with Checkpoint(folder) as given:
        plan = plan_mlx(config, given, None if dtype is None else DTYPES[dtype])
        _refuse_float16(plan, given)
        key = job_key(given, __version__, "export mlx", dtype, shard_bytes, plan, _code(), config.to_json_string())
        with temporary_folder(destination, key, plan.nbytes) as work:
            with naming(work, work):
                _write_files(work, folder, config, processor)
            _, outputs = write_shards(plan, given, work, shard_bytes, progress, False)
            publish_folder(work, destination)
    return Exported(destination, len(plan.outputs), len(outputs), plan.nbytes)


def plan_mlx(config: MonoInternVLConfig, source: Checkpoint, dtype: torch.dtype | None) -> Plan:
    """`source`, of either layout, under MLX's names.

    Raises:
        ValueError: the source's tensors are not those of `config`.
    """
    native = plan_native(config, source, layout_of(source))
    left_out = {_UNUSED, *([HEAD] if config.tie_word_embeddings else [])}
    outputs = [
        replace(output, name=mlx_name(output.name), dtype=dtype or output.dtype)
        for output in native.outputs
        if output.name not in left_out
    ]
    return replace(native, outputs=tuple(outputs))


def mlx_name(native: str) -> str:
    """Our name of a tensor -> the attribute of `mlx_model.Model`."""
    for ours, mlx in _NAMES.items():
        if native.startswith(ours):
            return mlx + native.removeprefix(ours)
    raise ValueError(f"{native} has no name in MLX's layout")


def _refuse_float16(plan: Plan, given: Checkpoint) -> None:
    if halves := [output for output in plan.outputs if output.dtype == torch.float16]:
        name = halves[0].sources[0]
        raise ValueError(f"{given.tensors[name].file}: {name} is {IN_FLOAT16}; give dtype bfloat16 or float32")


def _code() -> str:
    return Path(__file__).with_name("mlx_model.py").read_text(encoding="utf-8")


def _write_files(work: Path, folder: Path, config: MonoInternVLConfig, processor: MonoInternVLProcessor) -> None:
    (work / MODEL_FILE).write_text(_code(), encoding="utf-8")
    write_json(work / "config.json", mlx_config(config))
    processor.save_pretrained(work)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        write_json(work / name, _of_mlx(read_json(work / name)))
    generation = folder / "generation_config.json"
    if generation.is_file():
        # mlx-vlm puts this file's word on what ends an answer over that of config.json.
        write_json(work / generation.name, {**read_json(generation), "eos_token_id": stop_token_ids(config)})
    copy_licences(folder, work)


def mlx_config(config: MonoInternVLConfig) -> dict[str, Any]:
    """Our own values, and what mlx-vlm reads: the code's file, and the ids that end an answer."""

    def own(part: Any) -> dict[str, Any]:
        values = {name: getattr(part, name) for name in fields_of(type(part))}
        return {name: own(value) if isinstance(value, PreTrainedConfig) else value for name, value in values.items()}

    return {
        **own(config),
        "model_type": config.model_type,
        "model_file": MODEL_FILE,
        "eos_token_id": stop_token_ids(config),
    }


def _of_mlx(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration of processor or tokenizer without the code that it names, with the class of `mlx_model`."""
    kept = {name: _of_mlx(value) if isinstance(value, dict) else value for name, value in values.items()}
    kept.pop("auto_map", None)
    return {**kept, "processor_class": PROCESSOR_CLASS} if "processor_class" in kept else kept
