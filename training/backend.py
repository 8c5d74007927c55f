"""What `auto` means on this machine: the attention backend of a stage, and whether its layers are compiled."""

from typing import NamedTuple

from ..common.compiling import reason_not_to_compile
from .stages import Stage


class Backend(NamedTuple):
    """How a stage computes.

    Attributes:
        attention: name for `attn_implementation`; None: the model's own.
        compiles: each decoder layer is compiled.
        row_length: packs are filled up to so many tokens, so that every batch has one shape; None: to the longest.
        reason: why layers are not compiled, or what to know of it.
    """

    attention: str | None
    compiles: bool
    row_length: int | None
    reason: str

    def __str__(self) -> str:
        layers = "layers compiled" if self.compiles else "layers as they are"
        return f"attention {self.attention or 'as in the model'}, {layers}" + (
            f": {self.reason}" if self.reason else ""
        )


def choose_backend(stage: Stage) -> Backend:
    """FlexAttention and compiled layers for packs on CUDA; the stage's own word first."""
    missing = reason_not_to_compile()
    attention: str | None = stage.attn_implementation
    if attention == "auto":
        attention = "flex_attention" if stage.packing and missing is None else None
    one_shape = stage.packing and attention == "flex_attention"
    if stage.compile == "auto":
        compiles = missing is None and one_shape
        reason = "" if compiles else missing or _shapes(stage, attention) or "by default only under flex_attention"
    else:
        compiles = bool(stage.compile)
        reason = _shapes(stage, attention) if compiles else "by the recipe"
    row_length = stage.max_length if stage.packing and (compiles or one_shape) else None
    return Backend(attention, compiles, row_length, reason)


def _shapes(stage: Stage, attention: str | None) -> str:
    """Why batches of this stage are of many shapes, each of which is compiled until torch gives up; empty if not."""
    if (stage.packing or stage.padding_free) and attention in (None, "sdpa"):
        return "sdpa takes each layout of joined samples for another shape; packing with flex_attention does not"
    return "" if stage.packing else "rows differ in length from batch to batch"
