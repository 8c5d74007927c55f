"""Where a model looks while it answers: attention of every layer over text and picture, as in Fig. 5 of 2410.08202.

maps = collect_attention(model, processor, picture, "How many stars are there?")
maps.layers[0]                      float32 [T, T] of the first layer, mean over its heads
heat_map(maps, token=0)             float32 [rows * p, cols * p], where in the picture the first answer token comes from
draw_attention(maps, picture, token=0)

Legend: T tokens of prompt and answer, A answer tokens, L layers, p patches along a side of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn import functional as F

from ..image_processing_mono_internvl import load_image
from ..modeling_mono_internvl import MonoInternVLForCausalLM, place_images
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import count_tiles


SEGMENT_COLORS = {"text": "#4c78a8", "image": "#54a24b", "answer": "#f58518"}


class AttentionMaps(NamedTuple):
    """Attention weights, mean over heads; row i is what token i attends to.

    Attributes:
        layers: {layer from 0: float32 [T, T]}, the layers asked for.
        answer_rows: float32 [L, A, T], of all layers: the rows from which each answer token was predicted.
        visual: bool [T], which tokens are visual.
        answer: the answer's tokens as text, A of them; they are the last ones of T.
        grid: (cols, rows) of tiles; a thumbnail follows them when there is more than one.
    """

    layers: dict[int, torch.Tensor]
    answer_rows: torch.Tensor
    visual: torch.Tensor
    answer: list[str]
    grid: tuple[int, int]

    @property
    def segments(self) -> list[tuple[str, int, int]]:
        """Runs of one kind (text, image or answer), as (kind, first token, end)."""
        prompt = len(self.visual) - len(self.answer)
        kinds = ["image" if visual else "text" for visual in self.visual[:prompt].tolist()]
        kinds += ["answer"] * len(self.answer)
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        return [(kinds[i], i, end) for i, end in zip(starts, [*starts[1:], len(kinds)], strict=True)]


@torch.no_grad()
def collect_attention(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    picture: Any,
    question: str,
    *,
    layers: Sequence[int] = (0,),
    max_tiles: int | str | None = None,
    max_new_tokens: int = 64,
) -> AttentionMaps:
    """Answer greedily, then run prompt and answer once more and keep the attention weights.

    Only the mean over heads leaves a layer, so that memory is that of one layer's weights, [heads, T, T].

    Args:
        layers: whose whole maps to keep, from 0.

    Raises:
        ValueError: no such layer, an empty answer, or a picture or question that cannot be used.
    """
    decoder = model.get_decoder().layers  # type: ignore[union-attr]
    if unknown := [layer for layer in layers if not 0 <= layer < len(decoder)]:  # type: ignore[arg-type]
        raise ValueError(f"layer {unknown[0]} does not exist; this model has layers 0 to {len(decoder) - 1}")  # type: ignore[arg-type]
    image = load_image(picture, max_pixels=processor.image_processor.max_pixels)
    options = {} if max_tiles is None else {"max_tiles": max_tiles}
    inputs = processor.apply_chat_template(
        processor.conversation([(place_images(question, 1), None)], [image]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=options,
    ).to(model.device, model.dtype)
    stops = {"eos_token_id": processor.stop_token_ids, "pad_token_id": processor.tokenizer.pad_token_id}
    sequence = model.generate(**inputs, **stops, do_sample=False, max_new_tokens=max_new_tokens)
    prompt_length = inputs["input_ids"].shape[1]
    answer = [i for i in sequence[0, prompt_length:].tolist() if i not in processor.stop_token_ids]
    if not answer:
        raise ValueError("the model's answer is empty, so there is no answer token to look at")
    sequence = sequence[:, : prompt_length + len(answer)]

    whole: dict[int, torch.Tensor] = {}
    rows: list[torch.Tensor] = []

    def keep(module: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        weights = output[1][0].float().mean(0)
        # A token is predicted from the position before it.
        rows.append(weights[prompt_length - 1 : -1].cpu())
        if module.layer_idx in layers:
            whole[module.layer_idx] = weights.cpu()

    with _eager(model):
        hooks = [layer.self_attn.register_forward_hook(keep) for layer in decoder]  # type: ignore[union-attr]
        try:
            # The head is left out: logits of all positions would be the largest tensor by far.
            model.model(input_ids=sequence, pixel_values=inputs["pixel_values"], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return AttentionMaps(
        layers={layer: whole[layer] for layer in layers},
        answer_rows=torch.stack(rows),
        visual=(sequence[0] == model.config.image_token_id).cpu(),
        answer=[processor.tokenizer.decode([i]) for i in answer],
        grid=processor.image_processor.grid_of(*image.size, max_tiles=max_tiles),
    )


@contextmanager
def _eager(model: MonoInternVLForCausalLM) -> Iterator[None]:
    """Only eager attention hands its weights out; what the model used before is restored."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def heat_map(maps: AttentionMaps, token: int) -> torch.Tensor:
    """How much an answer token was drawn from each place of the picture, mean over heads and layers.

    The thumbnail shows the same picture once more: its weights are spread over the places that they stand for.

    Args:
        token: which answer token, from 0.

    Returns:
        float32 [rows * p, cols * p]; its sum is the share of attention that fell on the picture, at most 1.
    """
    weights = maps.answer_rows[:, token].mean(0)[maps.visual]
    cols, rows = maps.grid
    with_thumbnail = count_tiles(cols, rows, use_thumbnail=True)
    tiles = with_thumbnail if len(weights) % with_thumbnail == 0 else cols * rows
    p = round((len(weights) / tiles) ** 0.5)
    by_tile = weights.view(tiles, p, p)
    heat = by_tile[: cols * rows].view(rows, cols, p, p).transpose(1, 2).reshape(rows * p, cols * p)
    if tiles > cols * rows:
        spread = F.interpolate(by_tile[-1][None, None], size=heat.shape, mode="bilinear")[0, 0]
        heat = heat + spread * (by_tile[-1].sum() / spread.sum().clamp(min=1e-12))
    return heat


def draw_attention(maps: AttentionMaps, picture: Image.Image, token: int) -> Image.Image:
    """The heat map of one answer token over the picture, and beside it the maps of the layers kept.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("attention is drawn by matplotlib: pip install mono-internvl[eval]") from error

    total = len(maps.visual)
    figure = Figure(figsize=(3.4 * (1 + len(maps.layers)) + 0.6, 4.2), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(maps.layers), squeeze=False)[0]

    heat = heat_map(maps, token)
    frame = (0, picture.width, picture.height, 0)
    panels[0].imshow(picture, extent=frame)
    # Cold places are gray veils, so that the picture under hot ones stands out too.
    strength = 0.75 - 0.35 * heat / heat.max().clamp(min=1e-12)
    panels[0].imshow(heat, cmap="inferno", extent=frame, alpha=strength.numpy(), interpolation="bilinear")
    panels[0].set_xticks([])
    panels[0].set_yticks([])
    words = list(maps.answer)
    words[token] = f"{' ' * words[token].startswith(' ')}[{words[token].strip()}]"
    shown = "".join(words[max(token - 6, 0) : token + 6]).strip().replace("$", r"\$")
    panels[0].set_title(f"{shown}\n{heat.sum():.0%} of the attention is on the picture", fontsize=10, wrap=True)

    drawn = None
    for panel, (layer, weights) in zip(panels[1:], maps.layers.items(), strict=True):
        seen = weights.masked_fill(torch.ones_like(weights).triu(1).bool(), float("nan")).numpy()
        # Weights reach from 1 down to far below an equal share.
        drawn = panel.imshow(seen.clip(0.02 / total), cmap="viridis", norm=LogNorm(0.02 / total, 1.0))
        for kind, first, end in maps.segments:
            color, middle = SEGMENT_COLORS[kind], (first + end) / 2 - 0.5
            style = {"color": color, "clip_on": False, "linewidth": 5, "solid_capstyle": "butt"}
            panel.plot([first - 0.5, end - 0.5], [1.02 * total] * 2, **style)
            panel.plot([-0.02 * total] * 2, [first - 0.5, end - 0.5], **style)
            for edge in (first - 0.5, end - 0.5):
                panel.axvline(edge, color="white", linewidth=0.5)
                panel.axhline(edge, color="white", linewidth=0.5)
            if end - first > total / 12:
                panel.text(middle, 1.05 * total, kind, ha="center", va="top", fontsize=8, color=color)
        panel.set_xlim(-0.5, total - 0.5)
        panel.set_ylim(total - 0.5, -0.5)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(f"layer {layer + 1} of {len(maps.answer_rows)}", fontsize=10)
    if drawn is not None:
        figure.colorbar(drawn, ax=panels[1:], shrink=0.7, label="attention weight, mean over heads")
        names = [Patch(color=color, label=kind) for kind, color in SEGMENT_COLORS.items()]
        figure.legend(handles=names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    canvas.draw()
    width, height = canvas.get_width_height()
    return Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB")
