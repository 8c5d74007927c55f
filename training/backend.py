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
        reason = "" if compiles else missing or _reason(stage)
    else:
        compiles = bool(stage.compile)
        reason = "by the recipe" if not compiles else "" if one_shape else _reason(stage)
    row_length = stage.max_length if stage.packing and (compiles or one_shape) else None
    return Backend(attention, compiles, row_length, reason)


def _reason(stage: Stage) -> str:
    if stage.packing or stage.padding_free:
        return "samples joined in a row are new shapes in every batch, except to flex_attention with packing"
    return "rows differ in length from batch to batch"
