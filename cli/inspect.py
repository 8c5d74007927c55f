"""`mono-internvl inspect MODEL`: where the parameters are, counted without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import load_config, resolve_model, status


if TYPE_CHECKING:
    from torch import nn

    from ..configuration_mono_internvl import MonoInternVLConfig


# (group, parts of a parameter's name that belong to it); the first row that fits counts.
_GROUPS = (
    ("token embedding", ("embed_tokens.",)),
    ("output head", ("lm_head.",)),
    ("visual attention experts", (".self_attn.visual_",)),
    ("attention", (".self_attn.",)),
    ("text FFN (T-experts)", (".mlp.",)),
    ("visual FFN (V-experts)", (".visual_mlp.",)),
    ("norms", ("layernorm.", "norm.weight")),
    ("patch embedding + positions", ("vision_embeddings.",)),
    ("projector MLP", ("multi_modal_projector.",)),
)
# What runs for a text token: all there is to read when an answer is decoded.
TEXT_PATH = ("token embedding", "output head", "attention", "text FFN (T-experts)", "norms")


def parameter_groups(model: nn.Module) -> dict[str, int]:
    """Weights of a model by group, the meta device included; tied matrices count once, the unused class row too.

    Raises:
        ValueError: a parameter belongs to no group.
    """
    counts = dict.fromkeys([name for name, _ in _GROUPS], 0)
    class_rows = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("class_embedding")]
    for name, tensor in [*model.named_parameters(), *class_rows]:
        # The projector's LayerNorm is the projector's; norms are the decoder's.
        vision = "multi_modal_projector." in name or "vision_embeddings." in name
        rows = _GROUPS[-2:] if vision else _GROUPS[:-2]
        group = next((group for group, parts in rows if any(part in f".{name}" for part in parts)), None)
        if group is None:
            raise ValueError(f"the parameter {name} belongs to no known group")
        counts[group] += tensor.numel()
    return {group: count for group, count in counts.items() if count or "experts" not in group}


def released_2b_config() -> MonoInternVLConfig:
    """The dimensions of OpenGVLab/Mono-InternVL-2B."""
    from ..configuration_mono_internvl import MonoInternVLConfig

    return MonoInternVLConfig(text_config={"num_key_value_heads": 8}, dtype="bfloat16")


def build_on_meta(config: MonoInternVLConfig) -> nn.Module:
    """The module tree of a configuration, without memory for its weights."""
    import torch

    from ..modeling_mono_internvl import MonoInternVLForCausalLM

    config.text_config.drop_path_rate = 0.0  # has no weights, and would ask for timm
    with torch.device("meta"):
        return MonoInternVLForCausalLM(config)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, Hub id, or 2b for the released dimensions")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show a model's sizes by group; weights are not read."""
    with status("counting"):
        config = released_2b_config() if model == "2b" else load_config(resolve_model(model))
        facts = describe(config)
    if as_json:
        typer.echo(json.dumps({"model": model, **facts}, indent=2))
    else:
        _print_tables("Mono-InternVL-2B" if model == "2b" else Path(model).name or model, facts)


def describe(config: MonoInternVLConfig) -> dict[str, Any]:
    """Counts and dimensions as plain values: dtype, bytes_per_parameter, groups, total, text_path, config."""
    import torch

    text, vision = config.text_config, config.vision_config
    groups = parameter_groups(build_on_meta(config))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_parameter": dtype.itemsize,
        "groups": groups,
        "total": sum(groups.values()),
        "text_path": sum(groups[name] for name in TEXT_PATH),
        "config": {
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_position_embeddings,
            "visual_attention_experts": config.visual_attention_experts,
            "image_token_id": config.image_token_id,
            "tile_size": vision.image_size,
            "tokens_per_tile": vision.tokens_per_tile,
        },
    }


def _print_tables(name: str, facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    total, width = facts["total"], facts["bytes_per_parameter"]
    table = Table(title=f"{name}, {facts['dtype']}", title_justify="left", box=box.SIMPLE_HEAD, show_footer=False)
    table.add_column("group")
    for heading in ("parameters", "bytes", "share"):
        table.add_column(heading, justify="right")

    def row(label: str, count: int, style: str | None = None, end: bool = False) -> None:
        share = f"{count / total:.1%}"
        table.add_row(label, f"{count:,}", readable_bytes(count * width), share, style=style, end_section=end)

    groups = list(facts["groups"].items())
    for i, (label, count) in enumerate(groups):
        row(label, count, end=i == len(groups) - 1)
    row("total", total, style="bold")
    row("text path (runs when decoding)", facts["text_path"], style="bold")
    console.print(table)

    shown = facts["config"]
    lines = (
        ("decoder", f"{shown['layers']} layers, hidden {shown['hidden_size']}, FFN {shown['intermediate_size']}"),
        ("attention", f"{shown['heads']} heads, {shown['kv_heads']} kv heads of {shown['head_dim']}"),
        ("visual attention experts", shown["visual_attention_experts"]),
        ("vocabulary", f"{shown['vocab_size']:,} tokens, <IMG_CONTEXT> is {shown['image_token_id']}"),
        ("positions", f"{shown['max_position_embeddings']:,}"),
        ("tile", f"{shown['tile_size']} px, {shown['tokens_per_tile']} visual tokens of 28 x 28 px"),
    )
    details = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    for label, value in lines:
        details.add_row(label, value)
    console.print(details)


def readable_bytes(count: int) -> str:
    """1_234_567 -> '1.23 MB'; powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
