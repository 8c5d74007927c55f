"""One layer's feed-forward with routed experts, in the ways it can be computed, against a dense one of the same rows.

plain       what the model does: gather each group's rows, one expert each, write the rows back
fused       the same with gate and up as one product (their weights side by side)
streams     the same with the text group on a second CUDA stream
grouped     `torch.nn.functional.grouped_mm` over the sorted rows, weights of both experts in one tensor
both        the released formula: both experts on every row
permuting   gathering and writing back alone, without any product
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..modeling_mono_internvl import MonoInternVLDecoderLayer, RoutingPlan, make_routing_plan
from .measure import Place, captured, interleave, recorded, row
from .peers import PAPER_SIZES, BothExpertsLayer, preset_config


def make_layer(preset: str, place: Place) -> MonoInternVLDecoderLayer:
    torch.manual_seed(0)
    config = preset_config(preset).text_config
    config._attn_implementation = "sdpa"
    with torch.device(place.device):
        layer = MonoInternVLDecoderLayer(config, 0).to(place.dtype)
    return layer.eval().requires_grad_(False)


def ways(layer: MonoInternVLDecoderLayer, x: torch.Tensor, plan: RoutingPlan) -> dict[str, Callable[[], torch.Tensor]]:
    """Every way to compute the routed feed-forward of x [1, T, H]; all but dense and permuting give the same."""
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: layer.mlp(x),
        "plain": lambda: layer.feed_forward(x, plan),
        "both": lambda: BothExpertsLayer.feed_forward(layer, x, plan),  # type: ignore[arg-type]
        "fused": partial(_fused, _joined(layer), x, plan),
        "permuting": lambda: plan.combine(*plan.dispatch(x), x.shape[:2]),
    }
    if x.is_cuda:
        functions["streams"] = partial(_streams, layer, x, plan, torch.cuda.Stream())
    if hasattr(F, "grouped_mm"):
        ends = torch.tensor([plan.text.shape[0], x.shape[0] * x.shape[1]], dtype=torch.int32, device=x.device)
        functions["grouped"] = partial(_grouped, _joined(layer), x, torch.cat(plan), ends)
    return functions


def _joined(layer: MonoInternVLDecoderLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of both experts: gate over up [2, 2 * I, H], down [2, H, I]; text first."""
    experts = (layer.mlp, layer.visual_mlp)
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts])
    return gate_up, torch.stack([e.down_proj.weight for e in experts])


def _fused(weights: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    def expert(rows: torch.Tensor, i: int) -> torch.Tensor:
        gate, up = F.linear(rows, weights[0][i]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weights[1][i])

    text, visual = plan.dispatch(x)
    return plan.combine(expert(text, 0), expert(visual, 1), x.shape[:2])


def _streams(layer: Any, x: torch.Tensor, plan: RoutingPlan, side: torch.cuda.Stream) -> torch.Tensor:
    text, visual = plan.dispatch(x)
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        text = layer.mlp(text)
    visual = layer.visual_mlp(visual)
    main.wait_stream(side)
    return plan.combine(text, visual, x.shape[:2])


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
    sizes: tuple[tuple[int, int], ...] = PAPER_SIZES,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Each way against dense; on CUDA as CUDA graphs, so that only the device's time counts."""
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
            functions = {}
            for name, function in ways(layer, x, make_routing_plan(mask, visual)).items():
                with recorded(notes, f"{name} {tokens}"):
                    run = captured(function, place)
                    run()
                    functions[name] = run
            times = interleave(functions, place, rounds=21, seconds=seconds, calls=5 if place.is_cuda else 1)
            for name, values in times.items():
                if name != "dense":
                    goal: dict[str, float] = {"at_most": 1.03} if name == "plain" else {}
                    what = f"feed-forward {tokens}, {visual} visual: {name}"
                    rows.append(
                        row(what, "dense", values, times["dense"], way=name, tokens=tokens, visual=visual, **goal)
                    )
    return {"rows": rows, "settings": {"preset": preset}, "not_run": notes}
