"""Expanding: a dense decoder becomes a Mono-InternVL (arXiv 2410.08202, section 3.2).

- V-experts, and visual attention experts where asked for, are copies of the text ones, so that every token is computed
  as before, whichever experts it is routed to.
- The vocabulary grows by nine tokens behind the old ones, by one for learnable queries, and by a pad token where the
  base has none. New output rows are the mean of the old rows; new input rows are drawn with a standard deviation of
  0.02. (A matrix that is both gets the mean.)
- Patch embedding, positions, projector, learnable queries and expert gates are drawn with a standard deviation of 0.02,
  biases are 0, the projector's LayerNorm is the identity. All draws depend on `seed` and the tensor's name.
- With expert gates (BREEN, arXiv 2503.12446) text is not what it was: sigmoid of a small number scales the output of
  each feed-forward expert by about a half, until the gates are trained.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.files import read_json
from ..common.models import DTYPES, check_dtype
from ..compat_mono_internvl import IN_FLOAT16
from ..configuration_checks_mono_internvl import BIASED_PROJECTIONS, check_grids, check_placement
from ..configuration_mono_internvl import VISUAL_ATTENTION_EXPERTS, MonoInternVLConfig
from .families import ASSUMED, Family, family_of, has_biases, list_families
from .files import copy_licences, save_generation_config, save_native_config
from .job import Job, Report
from .plan import EMBEDDING, layout_name, plan_expansion, recipe
from .source import Checkpoint, encoder_tensor, find_source, vision_kind
from .tokenizer import Extended, extended_tokenizer, save_processor
from .verify import Differences, NativeView, compare_expansion
from .writer import Progress, check_destination, expand_user, parse_size


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# null means what no entry means, but for tokens, which a model may be without, and for what then follows from others.
_MAY_BE_NULL = ("bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "num_key_value_heads")
# Part of a layer -> one of the biases that it has, or has not.
_BIASES = {"qkv": "self_attn.q_proj.bias", "o": "self_attn.o_proj.bias", "mlp": "mlp.gate_proj.bias"}
# (q, k and v have biases, o has) -> `attention_bias`.
_ATTENTION_BIAS = {("q" in letters, "o" in letters): value for value, letters in BIASED_PROJECTIONS.items()}


def expand_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    visual_attention_experts: str = "none",
    vision_hidden_size: int = 1024,
    tile_size: int = 448,
    num_learnable_queries: int = 0,
    query_grids: Sequence[int] | None = None,
    query_placement: str = "image",
    expert_gates: bool = False,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "1GB",
    seed: int = 0,
    base_model: str | None = None,
    verify: bool = True,
    manifest: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Turn a dense checkpoint into a Mono-InternVL in our layout.

    Args:
        source: folder, or Hub id (`owner/name`, `owner/name@revision`), of one of `families.FAMILIES`.
        destination: folder to make; must not exist, or be empty. An interrupted call leaves a folder named
            `destination.KEY.partial`, and the same call goes on with it.
        visual_attention_experts: `none`, `qkv` or `qkvo` (Mono-InternVL-1.5).
        vision_hidden_size: channels of a 14-px patch.
        tile_size: side of a tile in pixels, a multiple of 28.
        num_learnable_queries, query_grids, query_placement, expert_gates: see `MonoInternVLConfig` and its
            `text_config`; 0 and False: the model has none.
        dtype: `auto` (the source's), `bfloat16` or `float32`, by name or as a `torch.dtype`.
        max_shard_size: bytes of a weight file at most, such as `2GB`; a larger tensor has a file of its own.
        seed: of everything that is drawn.
        base_model: Hub id for the model card, where `source` is a folder.
        verify: run both on fixed prompts before the folder gets its name.
        manifest: write the sha256 of every weight file, read and written, into `conversion.json`. Hashing takes longer
            than writing on processors without SHA instructions; without it sizes and headers are recorded.
        progress: called as `progress(bytes_written, bytes_in_all)`.

    Raises:
        FileExistsError: the destination is a file or not empty.
        FileNotFoundError: no such source, no weights, or a shard is missing.
        OSError: read-only or full disk.
        ValueError: a source that is not such a decoder, damaged files, wrong tensors, bad options; named.
    """
    dtype = str(dtype).removeprefix("torch.")
    check_dtype(dtype)
    if visual_attention_experts not in VISUAL_ATTENTION_EXPERTS:
        raise ValueError(
            f"visual_attention_experts={visual_attention_experts!r} is not one of {', '.join(VISUAL_ATTENTION_EXPERTS)}"
        )
    additions = read_additions(num_learnable_queries, query_grids, query_placement, expert_gates)
    parse_size(max_shard_size)
    destination = expand_user(destination)
    check_destination(destination)
    folder, origin = find_source(source)
    options: dict[str, Any] = {
        "visual_attention_experts": visual_attention_experts,
        "vision_hidden_size": vision_hidden_size,
        "tile_size": tile_size,
        "dtype": dtype,
        "seed": seed,
        "base_model": base_model,
        **additions,
    }
    family = dense_family(folder)
    layout = family.layout
    with Checkpoint(folder) as dense:
        _refuse_vision_tensors(dense)
        values = _read_dense(dense, family)
        ids = {role: values[role] for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if (folder / "generation_config.json").is_file():
            ids["stops"] = read_json(folder / "generation_config.json").get("eos_token_id")
        extended = extended_tokenizer(
            folder, family, values["vocab_size"], {"stops": None, **ids}, queries="num_learnable_queries" in additions
        )
        config = _expanded_config(dense, layout, values, extended, options)
        plan = plan_expansion(config, dense, layout, new_rows=extended.new_rows, dtype=DTYPES[dtype], seed=seed)

        def write_files(target: Path) -> None:
            save_native_config(config, target)
            save_generation_config(config, extended, target)
            if extended.tokenizer is not None:
                save_processor(extended, config, target)
            copy_licences(folder, target)

        def compare(made: Checkpoint) -> Differences:
            before, after = NativeView(dense, layout, config), NativeView(made, "native", config)
            return compare_expansion(before, after, dense.config["vocab_size"])

        how = (
            "A Mono-InternVL made from the dense language model {source} by `mono-internvl expand`: visual experts are "
            f"copies of the text experts, {_new_parts(additions)} new and **not trained yet**. "
            + ("Text is **not what it was** before the gates are trained" if expert_gates else "Text is what it was")
        )
        job = Job("expand", how, options, origin, dense, config, plan, base_model, manifest)
        return job.run(destination, write_files, compare if verify else None, max_shard_size, progress)


def read_additions(
    num_learnable_queries: int, query_grids: Sequence[int] | None, query_placement: str, expert_gates: bool
) -> dict[str, Any]:
    """The options of learnable queries and gates that say something; none of those that say "none".

    Raises:
        ValueError: a value that is not allowed, or one of queries where there are none; names it.
    """
    check_placement(num_learnable_queries, query_placement)
    if not isinstance(expert_gates, bool):
        raise ValueError(f"expert_gates={expert_gates!r} must be True or False")
    found: dict[str, Any] = {}
    if num_learnable_queries:
        grids = check_grids(num_learnable_queries, query_grids)
        found = {"num_learnable_queries": num_learnable_queries, "query_grids": grids}
        found["query_placement"] = query_placement
    elif query_grids is not None:
        raise ValueError(f"query_grids={query_grids!r} need num_learnable_queries")
    return {**found, "expert_gates": True} if expert_gates else found


def _new_parts(additions: dict[str, Any]) -> str:
    parts = ["the visual embedding"]
    parts += ["the learnable queries"] if "num_learnable_queries" in additions else []
    parts += ["the experts' gates"] if "expert_gates" in additions else []
    return f"{', '.join(parts[:-1])} and {parts[-1]} are" if len(parts) > 1 else f"{parts[0]} is"


def dense_family(folder: Path) -> Family:
    """The family of a dense decoder with all its dimensions.

    Raises:
        ValueError: the folder holds something else, or a variant that a Mono-InternVL cannot be; says what.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = vision_kind(values)
    if kind:
        raise ValueError(f"{folder} is {kind}; expand takes a dense language model: {list_families()}")
    family = family_of(values)
    if family is None:
        named = (values.get("architectures") or [values.get("model_type") or "not named"])[0]
        raise ValueError(f"{path}: the architecture is {named}; expand takes {list_families()}")
    missing = [name for name in _REQUIRED if not isinstance(values.get(name), int)]
    for name in ("num_key_value_heads", "head_dim"):
        if values.get(name) is not None and not isinstance(values[name], int):
            missing.append(name)
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} must be given as whole numbers")
    unsupported = ["quantization_config"] if values.get("quantization_config") else []
    if _slides(values):
        unsupported.append(f"sliding_window {values.get('sliding_window')}")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        unsupported.append(f"partial_rotary_factor {values['partial_rotary_factor']}")
    if (values.get("hidden_act") or "silu") not in ("silu", "swish"):
        unsupported.append(f"hidden_act {values['hidden_act']}")
    if unsupported:
        raise ValueError(f"{path}: {', '.join(unsupported)} is not supported")
    return family


def _slides(values: dict[str, Any]) -> bool:
    """Whether a layer sees a window of the text only: said of each layer, or, in Qwen's older files, from one on."""
    if values.get("layer_types"):
        return any(kind != "full_attention" for kind in values["layer_types"])
    windowed = values.get("use_sliding_window") and values.get("sliding_window", 0) is not None
    return bool(windowed) and values.get("max_window_layers", 0) < values["num_hidden_layers"]


def _refuse_vision_tensors(source: Checkpoint) -> None:
    name = encoder_tensor(source)
    if name:
        raise ValueError(
            f"{source.tensors[name].file} holds {name}: the vision tower of a modular InternVL, which Mono-InternVL "
            f"does not have; expand takes a dense language model: {list_families()}"
        )


def _read_dense(dense: Checkpoint, family: Family) -> dict[str, Any]:
    """The source's configuration with what its family's code assumes where it says nothing or null."""
    values = {name: value for name, value in dense.config.items() if value is not None or name in _MAY_BE_NULL}
    values = {**ASSUMED, **family.assumed, **values}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        if rope.get("rope_theta") is None:
            values["rope_parameters"] = {**rope, "rope_theta": values["rope_theta"]}
        values.pop("rope_theta")
        values.pop("rope_scaling", None)
    else:
        values.pop("rope_parameters", None)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["hidden_act"] == "swish":
        values["hidden_act"] = "silu"
    biased = {}
    for part, bias in _BIASES.items():
        in_tensors = recipe(f"model.language_model.layers.0.{bias}", family.layout)[1] in dense.tensors
        biased[part] = has_biases(family, part, dense.config, in_tensors)
    values.pop("bias", None)
    values["attention_bias"] = _ATTENTION_BIAS[biased["qkv"], biased["o"]]
    return {**values, "mlp_bias": biased["mlp"], "qk_norm": family.qk_norm}


def _expanded_config(
    dense: Checkpoint, layout: str, values: dict[str, Any], extended: Extended, options: dict[str, Any]
) -> MonoInternVLConfig:
    ids = {role: token for role, token in extended.ids.items() if role in values}
    values = {**values, **ids, "vocab_size": values["vocab_size"] + extended.new_rows}
    if options.get("expert_gates"):
        values["expert_gates"] = True
    queries = {name: value for name, value in options.items() if "quer" in name}
    dtype = DTYPES[options["dtype"]]
    if dtype is None:
        embedding = dense.tensors.get(layout_name(EMBEDDING, layout))
        dtype = embedding.dtype if embedding else torch.float32
    if dtype == torch.float16:
        raise ValueError(f"{dense.folder} is {IN_FLOAT16}; pass dtype bfloat16, or float32, which keeps every bit")
    try:
        return MonoInternVLConfig(
            llm_config=values,  # type: ignore[call-arg]
            vision_config={"hidden_size": options["vision_hidden_size"], "image_size": options["tile_size"]},
            **extended.control_ids,
            visual_attention_experts=options["visual_attention_experts"],
            **queries,
            dtype=dtype,
        )
    except ValueError as error:
        raise ValueError(f"{dense.folder / 'config.json'}: {error}") from error
