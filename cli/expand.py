"""`mono-internvl expand SRC DST`: a dense InternLM, Llama or Qwen becomes a Mono-InternVL."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .common import check_dtype, quiet_libraries
from .convert import (
    BaseModelOption,
    DestinationArgument,
    DryRunOption,
    ManifestOption,
    PrivateOption,
    PushOption,
    RevisionOption,
    ShardOption,
    VerifyOption,
    byte_bar,
    check_publishing,
    one_of,
    publish,
    show,
)


# `mono_internvl.configuration_mono_internvl.VISUAL_ATTENTION_EXPERTS`.
VISUAL_ATTENTION_EXPERTS = ("none", "qkv", "qkvo")
# `mono_internvl.configuration_checks_mono_internvl.QUERY_PLACEMENTS`.
QUERY_PLACEMENTS = ("image", "question")


def read_sides(text: str) -> list[int]:
    """`8,6` -> [8, 6].

    Raises:
        typer.BadParameter: something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"{text!r} is not allowed: give sides of squares, such as 8,6")
    return [int(word) for word in words]


def expand(
    source: Annotated[str, typer.Argument(metavar="SRC", help="folder or Hub id of a dense language model")],
    destination: DestinationArgument,
    visual_attention_experts: Annotated[
        str, typer.Option(metavar="WHICH", help="attention experts (1.5): none, qkv or qkvo")
    ] = "none",
    vision_hidden_size: Annotated[int, typer.Option(min=1, metavar="N", help="channels of a 14-px patch")] = 1024,
    tile_size: Annotated[int, typer.Option(min=28, metavar="PX", help="side of a tile, a multiple of 28")] = 448,
    num_learnable_queries: Annotated[
        int, typer.Option(min=0, metavar="N", help="learnable queries of a picture (BREEN; there 100)")
    ] = 0,
    query_grids: Annotated[
        Any,  # list[int] | None, which typer would take for an option that is given several times
        typer.Option(
            parser=read_sides, metavar="A,B", help="sides of their grids  [default: 8,6 for 100, else one square]"
        ),
    ] = None,
    query_placement: Annotated[
        str, typer.Option(metavar="WHERE", help="where they stand: behind each image, or behind the question")
    ] = "image",
    expert_gates: Annotated[
        bool, typer.Option("--expert-gates", help="scale each expert's output by a gate (BREEN); changes text")
    ] = False,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (the source's), bfloat16 or float32")] = "auto",
    max_shard_size: ShardOption = "1GB",
    seed: Annotated[int, typer.Option(metavar="N", help="of all that is new and drawn")] = 0,
    base_model: BaseModelOption = None,
    verify: VerifyOption = True,
    manifest: ManifestOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    revision: RevisionOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Make a Mono-InternVL of a dense language model: experts are copies, the visual embedding is new.

    SRC is an InternLM2, 2.5 or 3, a Llama, a Qwen2, 2.5 or 3. An interrupted run is gone on with by the same command.
    """
    check_publishing(push_to_hub, private, revision, dry_run)
    one_of(visual_attention_experts, VISUAL_ATTENTION_EXPERTS, "--visual-attention-experts")
    one_of(query_placement, QUERY_PLACEMENTS, "--query-placement")
    check_dtype(dtype)
    from mono_internvl.conversion import expand_checkpoint

    quiet_libraries()
    with byte_bar("expanding") as progress:
        report = expand_checkpoint(
            source,
            destination,
            visual_attention_experts=visual_attention_experts,
            vision_hidden_size=vision_hidden_size,
            tile_size=tile_size,
            num_learnable_queries=num_learnable_queries,
            query_grids=query_grids,
            query_placement=query_placement,
            expert_gates=expert_gates,
            dtype=dtype,
            max_shard_size=max_shard_size,
            seed=seed,
            base_model=base_model,
            verify=verify,
            manifest=manifest,
            progress=progress,
        )
    show(report)
    if expert_gates and report.differences is not None:
        typer.echo("the dense model was given the same expert gates for that: with them text is not what it was")
    publish(destination, push_to_hub, private, revision, dry_run)
