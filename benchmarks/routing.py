"""One layer's routed experts, in the ways they can be computed, against a dense layer of the same rows: feed-forward
experts, and attention experts' queries, keys and values (1.5).

plain       gather each group's rows, one expert each, write the rows back
kernel      both experts in one launch, rows read and written where they are (`expert_kernels_mono_internvl.py`)
joined      plain with gate and up as one product (their weights side by side)
streams     plain with the text group on a second CUDA stream
grouped     `torch.nn.functional.grouped_mm` over the sorted rows, weights of both experts in one tensor
both        the released formula: both experts on every row
permuting   gathering and writing back alone, without any product
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..experts_mono_internvl import combine, dispatch, kernel_refusal, routed_feed_forward, routed_linears
from ..modeling_mono_internvl import MonoInternVLDecoderLayer, RoutingPlan, make_routing_plan
from .measure import Place, captured, interleave, recorded, row
from .peers import PAPER_SIZES, BothExpertsLayer, preset_config


# (visual, text) tokens: one tile and its question, then the paper's.
SIZES = ((256, 64), *PAPER_SIZES)
# With launches, as users start it, the ways that the model itself can take.
_EAGER = ("dense", "plain", "kernel")
# Tokens from which on the routed feed-forward should cost what one dense expert costs.
_GOAL_FROM = 1024


def make_layer(preset: str, place: Place) -> MonoInternVLDecoderLayer:
    torch.manual_seed(0)
    config = preset_config(preset).text_config
    config._attn_implementation = "sdpa"
    config.visual_attention_experts = "qkvo"
    with torch.device(place.device):
        layer = MonoInternVLDecoderLayer(config, 0).to(place.dtype)
    return layer.eval().requires_grad_(False)


def ways(layer: MonoInternVLDecoderLayer, x: torch.Tensor, plan: RoutingPlan) -> dict[str, Callable[[], torch.Tensor]]:
    """Every way to compute the routed feed-forward of x [1, T, H]; all but dense and permuting give the same."""
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: layer.mlp(x),
        "plain": lambda: routed_feed_forward(x, plan, layer.mlp, layer.visual_mlp, "plain"),
        "both": lambda: BothExpertsLayer.feed_forward(layer, x, plan),  # type: ignore[arg-type]
        "joined": partial(_gate_up_joined, _joined(layer), x, plan),
        "permuting": lambda: combine(*dispatch(x, plan), plan, x.shape[:2]),
    }
    if kernel_refusal(x, plan, layer.mlp, layer.visual_mlp) is None:
        functions["kernel"] = lambda: routed_feed_forward(x, plan, layer.mlp, layer.visual_mlp, "fused")
    if x.is_cuda:
        functions["streams"] = partial(_streams, layer, x, plan, torch.cuda.Stream())
    if hasattr(F, "grouped_mm"):
        ends = torch.tensor([plan.text.shape[0], x.shape[0] * x.shape[1]], dtype=torch.int32, device=x.device)
        functions["grouped"] = partial(_grouped, _joined(layer), x, torch.cat(plan), ends)
    return functions


def projections(layer: MonoInternVLDecoderLayer, x: torch.Tensor, plan: RoutingPlan) -> dict[str, Callable[[], Any]]:
    """Every way to make queries, keys and values of x [1, T, H] with attention experts; dense: with the text ones."""
    attention = layer.self_attn
    text = (attention.q_proj, attention.k_proj, attention.v_proj)
    pairs = list(zip(text, (attention.visual_q_proj, attention.visual_k_proj, attention.visual_v_proj), strict=True))
    functions: dict[str, Callable[[], Any]] = {
        "dense": lambda: [linear(x) for linear in text],
        "plain": lambda: routed_linears(x, plan, pairs, "plain"),
    }
    if kernel_refusal(x, plan, *pairs[0]) is None:
        functions["kernel"] = lambda: routed_linears(x, plan, pairs, "fused")
    return functions


def _joined(layer: MonoInternVLDecoderLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of both experts: gate over up [2, 2 * I, H], down [2, H, I]; text first."""
    experts = (layer.mlp, layer.visual_mlp)
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts])
    return gate_up, torch.stack([e.down_proj.weight for e in experts])


def _gate_up_joined(weights: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    def expert(rows: torch.Tensor, i: int) -> torch.Tensor:
        gate, up = F.linear(rows, weights[0][i]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weights[1][i])

    text, visual = dispatch(x, plan)
    return combine(expert(text, 0), expert(visual, 1), plan, x.shape[:2])


def _streams(layer: Any, x: torch.Tensor, plan: RoutingPlan, side: torch.cuda.Stream) -> torch.Tensor:
    text, visual = dispatch(x, plan)
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        text = layer.mlp(text)
    visual = layer.visual_mlp(visual)
    main.wait_stream(side)
    return combine(text, visual, plan, x.shape[:2])


def _grouped(
    weights: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    rows = x.flatten(0, 1).index_select(0, order)
    gate, up = F.grouped_mm(rows, weights[0].transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, weights[1].transpose(1, 2), offs=ends)
    return torch.empty_like(rows).index_copy_(0, order, rows).view_as(x)


def run_routing(
    place: Place,
    *,
    preset: str = "2b",
    sizes: tuple[tuple[int, int], ...] = SIZES,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Each way against dense; on CUDA as CUDA graphs, where only the device's time counts, the model's own also eager.

    Args:
        sizes: (visual, text) tokens.
        seconds: for all ways at one size.
    """
    layer = make_layer(preset, place)
    hidden = layer.mlp.gate_proj.in_features
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.inference_mode():
        for visual, text in sizes:
            tokens = visual + text
            x = torch.randn(1, tokens, hidden, device=place.device, dtype=place.dtype)
            mask = torch.zeros(1, tokens, dtype=torch.bool, device=place.device)
            mask[:, text // 4 : text // 4 + visual] = True
            plan = make_routing_plan(mask, visual)
            if (reason := kernel_refusal(x, plan, layer.mlp, layer.visual_mlp)) is not None:
                notes["kernel"] = reason
            for what, functions in (
                ("feed-forward", ways(layer, x, plan)),
                ("q, k and v", projections(layer, x, plan)),
            ):
                common = {"tokens": tokens, "visual": visual}
                label = f"{what} {tokens}, {visual} visual"
                if place.is_cuda:
                    graphs = _graphs(functions, label, place, notes)
                    rows += _measure(label, "graph", graphs, place, seconds / 4, common)
                eager = {name: f for name, f in functions.items() if name in _EAGER or not place.is_cuda}
                rows += _measure(label, "eager", eager, place, seconds / 4, common)
    return {"rows": rows, "settings": {"preset": preset}, "not_run": notes}


def _graphs(
    functions: dict[str, Callable[[], Any]], label: str, place: Place, notes: dict[str, str]
) -> dict[str, Callable[[], Any]]:
    """Those of the functions that can be captured, captured; a note of the others."""
    graphs = {}
    for name, function in functions.items():
        with recorded(notes, f"{label}: {name}"):
            run = captured(function, place)
            run()
            graphs[name] = run
    return graphs


def _measure(
    label: str,
    mode: str,
    functions: dict[str, Callable[[], Any]],
    place: Place,
    seconds: float,
    common: dict[str, Any],
) -> list[dict[str, Any]]:
    times = interleave(functions, place, rounds=21, seconds=seconds, calls=5 if place.is_cuda else 1)
    # What the model takes on this device, see `experts_mono_internvl.py`.
    own = "kernel" if place.is_cuda and "kernel" in times else "plain"
    rows = []
    for name, values in times.items():
        has_goal = name == own and mode == "graph" and common["tokens"] >= _GOAL_FROM
        goal: dict[str, float] = {"at_most": 1.05} if has_goal else {}
        more = {"note": mode, "mode": mode, "way": name, **common, **goal}
        rows.append(row(f"{label}: {name}", "dense", values, times["dense"], **more))
    return rows
