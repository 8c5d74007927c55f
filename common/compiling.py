"""Decoder layers compiled one by one: the same code for training and for what is measured.

A layer is compiled, not the model: layers of one kind share their graphs, whatever looks at the data (the check of
placeholders, positions, places that are learnt) stays outside, and so does what DDP, FSDP and ZeRO hang on a layer.
"""

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..modeling_mono_internvl import MonoInternVLDecoderLayer


# Graphs of one layer before torch gives up and runs it as it is. Packs need three; a first layer whose input is a view,
# the absence of a mask and what FSDP hands on each double that.
MOST_GRAPHS = 32
LAYERS = (MonoInternVLDecoderLayer, LlamaDecoderLayer)


def decoder_layers(*models: nn.Module) -> Iterator[nn.Module]:
    """The decoder layers of the models, those of subclasses and inside wrappers too."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(module, LAYERS))


def compile_layers(
    *models: nn.Module, fullgraph: bool = False, dynamic: bool | None = None, backend: str = "inductor"
) -> None:
    """Compile each decoder layer's `forward` in place; names of parameters stay.

    The hooks of a layer stay outside its graph, so FSDP and ZeRO may have been applied already (for FSDP2 they must
    have been, as it changes the class of a layer and with it the `forward` that is compiled here).

    Args:
        fullgraph: an error instead of a graph in parts.
        dynamic: False: a graph for every shape; None: what has changed once is a variable of the next graph, so that
            packs with different numbers of tiles need three graphs: the first, any number, none.
        backend: of `torch.compile`.
    """
    # DDP's own cutting of graphs is for whole models, and refuses FlexAttention: each layer is one graph, and its
    # gradients travel while the layer before it is computed.
    config = torch._dynamo.config
    config.optimize_ddp = False
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    for layer in decoder_layers(*models):
        layer.forward = torch.compile(layer.forward, fullgraph=fullgraph, dynamic=dynamic, backend=backend)


def uncompile_layers(*models: nn.Module) -> None:
    """Undo `compile_layers`, and forget the graphs."""
    for layer in decoder_layers(*models):
        layer.__dict__.pop("forward", None)
    torch.compiler.reset()


def reason_not_to_compile() -> str | None:
    """Why this machine's layers stay as they are by default; None where compiling them pays."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability() < (7, 0):
        return "the GPU is older than what Triton compiles for"
    return None
