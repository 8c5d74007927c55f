"""`mono-internvl inspect MODEL`: where the parameters are, counted without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import quiet_libraries, status


if TYPE_CHECKING:
    from mono_internvl.configuration_mono_internvl import MonoInternVLConfig


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="folder, Hub id, nano, or 2b for the released dimensions")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show a model's sizes by group; weights are not read."""
    with status("counting"):
        from mono_internvl.common.models import load_config, resolve_model
        from mono_internvl.common.parameters import released_2b_config

        quiet_libraries()
        config = released_2b_config() if model == "2b" else load_config(resolve_model(model))
        facts = describe(config)
    if as_json:
        typer.echo(json.dumps({"model": model, **facts}, indent=2))
    else:
        _print_tables("Mono-InternVL-2B" if model == "2b" else Path(model).name or model, facts)


def describe(config: MonoInternVLConfig) -> dict[str, Any]:
    """Counts and dimensions as plain values: dtype, bytes_per_parameter, groups, total, text_path, config; and why this
    machine cannot run the fused expert kernel in bfloat16 (None: it can)."""
    import torch

    from mono_internvl.common.parameters import TEXT_PATH, build_on_meta, count_by_part
    from mono_internvl.experts_mono_internvl import device_refusal

    text, vision = config.text_config, config.vision_config
    groups = count_by_part(build_on_meta(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_parameter": dtype.itemsize,
        "groups": groups,
        "total": sum(groups.values()),
        # Of the gates one of each pair: both experts have one of the same size.
        "text_path": sum(groups[name] for name in TEXT_PATH) + groups.get("expert gates", 0) // 2,
        "expert_kernel_refusal": device_refusal(torch.device(device), torch.bfloat16),
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
            "expert_gates": text.expert_gates,
            "num_learnable_queries": config.num_learnable_queries,
            "query_grids": config.query_grids,
            "query_placement": config.query_placement if config.num_learnable_queries else None,
            "query_token_id": config.query_token_id,
            "expert_kernel": text.expert_kernel,
            "image_token_id": config.image_token_id,
            "tile_size": vision.image_size,
            "tokens_per_tile": vision.tokens_per_tile,
        },
    }


def _print_tables(name: str, facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mono_internvl.common.files import readable_bytes

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
    lines = [
        ("decoder", f"{shown['layers']} layers, hidden {shown['hidden_size']}, FFN {shown['intermediate_size']}"),
        ("attention", f"{shown['heads']} heads, {shown['kv_heads']} kv heads of {shown['head_dim']}"),
        ("visual attention experts", shown["visual_attention_experts"]),
        ("expert kernel", f"{shown['expert_kernel']}; here: {facts['expert_kernel_refusal'] or 'it can run'}"),
        ("vocabulary", f"{shown['vocab_size']:,} tokens, <IMG_CONTEXT> is {shown['image_token_id']}"),
        ("positions", f"{shown['max_position_embeddings']:,}"),
        ("tile", f"{shown['tile_size']} px, {shown['tokens_per_tile']} visual tokens of 28 x 28 px"),
    ]
    if shown["expert_gates"]:
        lines.append(("expert gates", "sigmoid(w x) scales the output of each text and each visual FFN"))
    if shown["num_learnable_queries"]:
        grids = " + ".join(f"{side} x {side}" for side in shown["query_grids"])
        place = {"image": "behind each image", "question": "behind the question, which is repeated"}
        lines.append(
            (
                "learnable queries",
                f"{shown['num_learnable_queries']} ({grids}) {place[shown['query_placement']]}; visual experts compute "
                f"them, <QUERY_CONTEXT> is {shown['query_token_id']}",
            )
        )
    details = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    for label, value in lines:
        details.add_row(label, value)
    console.print(details)
