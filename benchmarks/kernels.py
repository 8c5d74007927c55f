"""What the model chooses among by device and size, each way against the plain one: the output head's products, and the
attention of one query a head to a cache with a mask."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from ..attention_mono_internvl import (
    cudnn_decode_forward,
    decode_attention,
    grouped_sdpa_forward,
    has_cudnn_attention,
    product_decode_forward,
)
from ..output_head_mono_internvl import MonoInternVLOutputHead
from .measure import Place, captured, interleave, recorded, row
from .peers import preset_config


# Rows of hidden states: a decoded token, a batch of them, prompts, packs.
HEAD_ROWS = (1, 16, 64, 256, 1024, 4096)
# With a backward: rows that something is learnt at.
TRAINED_ROWS = (64, 256, 1024, 4096)
# (requests, tokens of the cache)
CACHES = ((1, 1088), (1, 4160), (8, 1088), (16, 2048))


def run_head(
    place: Place,
    *,
    preset: str = "2b",
    rows: tuple[int, ...] = HEAD_ROWS,
    trained: tuple[int, ...] = TRAINED_ROWS,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """The ways of `MonoInternVLOutputHead` at the preset's vocabulary; on CUDA each as a CUDA graph.

    Args:
        rows: of hidden states, without a gradient.
        trained: of hidden states, cross entropy and its backward included.
        seconds: for all ways of one number of rows.
    """
    text = preset_config(preset).text_config
    torch.manual_seed(0)
    head = MonoInternVLOutputHead(text.hidden_size, text.vocab_size, device=place.device).to(place.dtype)  # type: ignore[arg-type]
    results: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    for count, learns in [(count, False) for count in rows] + [(count, True) for count in trained]:
        x = torch.randn(count, text.hidden_size, device=place.device, dtype=place.dtype, requires_grad=learns)
        labels = torch.randint(text.vocab_size, (count,), device=place.device)
        ways = ("plain", "padded") if learns else ("plain", "padded", "split")
        functions: dict[str, Callable[[], Any]] = {
            way: partial(_learn, head, x, labels, way) if learns else partial(head.product, x, way) for way in ways
        }
        with torch.set_grad_enabled(learns):
            chosen = head.way(x)
            what = f"head, {count} rows" + (", with backward" if learns else "")
            results += _compare(what, functions, chosen, place, seconds, notes, {"rows": count, "learns": learns})
        head.zero_grad(set_to_none=True)
        place.release()
    return {"rows": results, "not_run": notes, "settings": {"preset": preset, "vocabulary": text.vocab_size}}


def _learn(head: MonoInternVLOutputHead, x: torch.Tensor, labels: torch.Tensor, way: str) -> None:
    loss = F.cross_entropy(head.product(x, way).float(), labels)
    torch.autograd.grad(loss, (x, head.weight))


def run_attention(
    place: Place, *, preset: str = "2b", caches: tuple[tuple[int, int], ...] = CACHES, seconds: float = 2.0
) -> dict[str, Any]:
    """The ways of `decode_attention`, and keys and values repeated as transformers does; on CUDA as CUDA graphs.

    Args:
        caches: (requests, tokens of the cache).
        seconds: for all ways at one size.
    """
    text = preset_config(preset).text_config
    heads, groups, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    results: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    for batch, length in caches:
        make = partial(torch.randn, device=place.device, dtype=place.dtype)
        query, key, value = (
            make(batch, heads, 1, width),
            make(batch, groups, length, width),
            make(batch, groups, length, width),
        )
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=place.device)
        mask[..., -64:] = False  # places that are not written yet
        module = SimpleNamespace(num_key_value_groups=heads // groups)
        ways: dict[str, Callable[..., Any]] = {
            "grouped": grouped_sdpa_forward,
            "repeated": _repeated_forward,
            "product": product_decode_forward,
        }
        if place.is_cuda and has_cudnn_attention():
            ways["cudnn"] = cudnn_decode_forward
        own = decode_attention(query)
        chosen = next(name for name, way in ways.items() if way is own)
        functions: dict[str, Callable[[], Any]] = {
            name: partial(way, module, query, key, value, mask, width**-0.5) for name, way in ways.items()
        }
        with torch.inference_mode():
            common = {"batch": batch, "tokens": length}
            results += _compare(
                f"attention, {batch} x {length}", functions, chosen, place, seconds, notes, common, against="grouped"
            )
    return {"rows": results, "not_run": notes, "settings": {"preset": preset}}


def _repeated_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _compare(
    label: str,
    functions: dict[str, Callable[[], Any]],
    chosen: str,
    place: Place,
    seconds: float,
    notes: dict[str, str],
    common: dict[str, Any],
    against: str = "plain",
) -> list[dict[str, Any]]:
    """One row a way; the one that the model takes here may be no slower than what it is compared with."""
    runs = {}
    for name, function in functions.items():
        with recorded(notes, f"{label}: {name}"):
            run = captured(function, place)
            run()
            runs[name] = run
    times = interleave(runs, place, rounds=21, seconds=seconds, calls=10 if place.is_cuda else 1)
    rows = []
    for name, values in times.items():
        more: dict[str, Any] = {"way": name, "chosen": name == chosen, **common}
        if name == chosen:
            more |= {"at_most": 1.03, "note": "the model's choice here"}
        rows.append(row(f"{label}: {name}", against, values, times[against], **more))
    return rows
