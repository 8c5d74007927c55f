"""Compares what went in with what came out, by running both on a fixed set of prompts.

One layer at a time: its weights are mapped from the checkpoint, all prompts pass through it, the next one takes its
place. So a model of any size is verified in the memory of a layer. The layer is the model's own code.

The prompts are token ids drawn once from a fixed seed: a folder without a tokenizer is verified too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_mono_internvl import MonoInternVLConfig
from ..modeling_mono_internvl import (
    MonoInternVLMultiModalProjector,
    MonoInternVLRotaryEmbedding,
    MonoInternVLTextModel,
    MonoInternVLVisionEmbeddings,
    make_routing_plan,
)
from .plan import EMBEDDING, HEAD, Output, Plan, head_layout, layout_name, produce, recipe, stored_dtype
from .source import Checkpoint


LOGITS_TOLERANCE = 1e-5
_PROMPTS, _LENGTH, _IMAGE_TOKENS = 3, 12, 4
_HEAD_ROWS = 4096


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences over the prompts; `identical`: the hidden states are equal bit for bit."""

    hidden_states: float
    logits: float
    identical: bool

    @property
    def passed(self) -> bool:
        return self.identical and self.logits <= LOGITS_TOLERANCE


class NativeView:
    """A checkpoint of any layout under our names, in the dtype of `config`."""

    def __init__(self, checkpoint: Checkpoint, layout: str, config: MonoInternVLConfig):
        self.checkpoint, self.layout, self.config = checkpoint, layout, config
        # Activations overflow in float16.
        self.dtype = torch.float32 if config.dtype == torch.float16 else stored_dtype(config)
        self._plan = Plan((), head_layout(config))

    def read(self, name: str) -> torch.Tensor:
        operation, of = recipe(name, self.layout)
        if operation == "copy":
            return self.checkpoint.read(of).to(self.dtype)
        output = Output(name, (), self.dtype, operation, (of,))
        return torch.cat(list(produce(output, self._plan, self.checkpoint)))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.checkpoint.rows(layout_name(name, self.layout), start, stop).to(self.dtype)

    @property
    def head(self) -> str:
        """The output matrix: the embedding's where there is no other."""
        return HEAD if layout_name(HEAD, self.layout) in self.checkpoint.tensors else EMBEDDING

    def load_into(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        module.load_state_dict({name: self.read(prefix + name) for name in names}, strict=False, assign=True)


class GatedView(NativeView):
    """A dense decoder whose feed-forward is scaled by the gates that an expanded one's `expert` has (`mlp` or
    `visual_mlp`)."""

    def __init__(self, dense: NativeView, expanded: NativeView, expert: str):
        super().__init__(dense.checkpoint, dense.layout, dense.config)
        self.expanded, self.expert = expanded, expert

    def read(self, name: str) -> torch.Tensor:
        if ".output_gate." in name:
            return self.expanded.read(name.replace(".mlp.", f".{self.expert}."))
        return super().read(name)


@torch.no_grad()
def compare_expansion(dense: NativeView, expanded: NativeView, old_rows: int) -> Differences:
    """The dense decoder against the expanded one: as text, and with every token routed to the visual experts. Gates of
    the experts, which a dense decoder does not have, are lent to it: then text is not what it was."""
    ids = _prompt_ids(old_rows)
    gated = expanded.config.text_config.expert_gates
    ways = {"mlp": None, "visual_mlp": torch.ones_like(ids, dtype=torch.bool)}
    found, before = [], None
    for expert, mask in ways.items():
        if gated or before is None:
            view = GatedView(dense, expanded, expert) if gated else dense
            before = last_hidden_states(view, embed(dense, ids), None)
        after = last_hidden_states(expanded, embed(expanded, ids), mask)
        found.append(_compare(dense, expanded, before, after, old_rows))
    return _worst(found)


@torch.no_grad()
def compare_layouts(before: NativeView, after: NativeView) -> Differences:
    """Two layouts of one model, on prompts that begin with visual tokens of a drawn tile."""
    rows = before.config.text_config.vocab_size
    ids = _prompt_ids(rows)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :_IMAGE_TOKENS] = True
    hidden = []
    for view in (before, after):
        x = embed(view, ids)
        x[mask] = image_features(view)[:_IMAGE_TOKENS].repeat(len(ids), 1)
        hidden.append(last_hidden_states(view, x, mask))
    features = _compare_bits(image_features(before), image_features(after))
    return _worst([features, _compare(before, after, hidden[0], hidden[1], rows)])


def _prompt_ids(vocab_size: int) -> torch.Tensor:
    """int64 [prompts, length], every prompt another stretch of the vocabulary's whole range."""
    return torch.randint(vocab_size, (_PROMPTS, _LENGTH), generator=torch.Generator().manual_seed(0))


def embed(view: NativeView, ids: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] -> [B, T, H]; only the rows of these ids are read."""
    rows = [view.rows(EMBEDDING, token, token + 1) for token in ids.flatten().tolist()]
    return torch.cat(rows).view(*ids.shape, -1)


def last_hidden_states(view: NativeView, x: torch.Tensor, visual_token_mask: torch.Tensor | None) -> torch.Tensor:
    """Embeddings [B, T, H] through all layers and the last norm; without a mask the V-experts are not read."""
    text = copy.deepcopy(view.config.text_config)
    layers, text.num_hidden_layers, text.vocab_size, text.pad_token_id = text.num_hidden_layers, 1, 1, None
    text.drop_path_rate = 0.0
    with torch.device("meta"):
        model = MonoInternVLTextModel._from_config(text, attn_implementation="eager").eval()
    model.rotary_emb = MonoInternVLRotaryEmbedding(text)
    norm, model.norm = model.norm, nn.Identity()  # type: ignore[assignment]
    routing = None if visual_token_mask is None else make_routing_plan(visual_token_mask, int(visual_token_mask.sum()))
    layer = model.layers[0]
    names = [name for name in layer.state_dict() if routing is not None or "visual_" not in name]
    for i in range(layers):
        view.load_into(layer, f"model.language_model.layers.{i}.", names)
        x = model(inputs_embeds=x, routing=routing, use_cache=False).last_hidden_state
    view.load_into(norm, "model.language_model.norm.", ["weight"])
    return norm(x)


def image_features(view: NativeView) -> torch.Tensor:
    """A drawn tile -> its visual tokens, [P, H]."""
    config = view.config
    with torch.device("meta"):
        parts = {
            "model.vision_embeddings.": MonoInternVLVisionEmbeddings(config.vision_config),
            "model.multi_modal_projector.": MonoInternVLMultiModalProjector(config),
        }
    vision = config.vision_config
    shape = (1, vision.tokens_per_tile, 3 * vision.token_size**2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(view.dtype)
    for prefix, module in parts.items():
        view.load_into(module, prefix, list(module.state_dict()))
        x = module(x)
    return x[0]


def _compare(
    before: NativeView, after: NativeView, hidden_before: torch.Tensor, hidden_after: torch.Tensor, rows: int
) -> Differences:
    """Hidden states, and the logits of the first `rows` tokens in float32."""
    logits = 0.0
    for start in range(0, rows, _HEAD_ROWS):
        stop = min(start + _HEAD_ROWS, rows)
        a, b = (
            hidden.float() @ view.rows(view.head, start, stop).float().T
            for view, hidden in ((before, hidden_before), (after, hidden_after))
        )
        logits = max(logits, _compare_bits(a, b).hidden_states)
    found = _compare_bits(hidden_before, hidden_after)
    return Differences(found.hidden_states, logits, found.identical)


def _compare_bits(a: torch.Tensor, b: torch.Tensor) -> Differences:
    """Values that are the same NaN on both sides are equal; a NaN on one side is infinitely far."""
    bits = torch.int16 if a.dtype.itemsize == 2 else torch.int32 if a.dtype.itemsize == 4 else torch.int64
    differ = a.contiguous().view(bits) != b.contiguous().view(bits)
    if not bool(differ.any()):
        return Differences(0.0, 0.0, True)
    largest = float((a.double() - b.double())[differ].abs().nan_to_num(nan=math.inf).max())
    return Differences(largest, 0.0, False)


def _worst(found: Iterable[Differences]) -> Differences:
    results = list(found)
    return Differences(
        max(result.hidden_states for result in results),
        max(result.logits for result in results),
        all(result.identical for result in results),
    )
