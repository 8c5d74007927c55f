"""Parameter groups: what a stage names when it says what trains.

visual_embedding          patch and position embedding, and the MLP behind it
visual_experts            FFN_v of every layer (paper 2410.08202, eq. 4)
visual_attention_experts  the visual projections of attention (1.5)
attention                 the language model's q, k, v and o projections
text                      everything else of the language model: FFN_t, norms, token embedding, output head
"""

from collections.abc import Collection, Iterable

from torch import nn


GROUPS = ("visual_embedding", "visual_experts", "visual_attention_experts", "attention", "text")


def group_of(name: str) -> str:
    """The group of a parameter or module, by its dotted name (ours, or a dense Llama's)."""
    parts = name.split(".")
    if "vision_embeddings" in parts or "multi_modal_projector" in parts:
        return "visual_embedding"
    if "visual_mlp" in parts:
        return "visual_experts"
    if "self_attn" in parts:
        return "visual_attention_experts" if any(part.startswith("visual_") for part in parts) else "attention"
    return "text"


def grouped_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the model once, by group; groups that the model lacks are left out."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(group_of(name), []).append(parameter)
    return {group: found[group] for group in GROUPS if group in found}


def train_only(model: nn.Module, groups: Iterable[str]) -> None:
    """Let the named groups train and freeze all others (delta tuning).

    Raises:
        ValueError: a group that the model does not have.
    """
    found, wanted = grouped_parameters(model), set(groups)
    absent = sorted(wanted - set(found))
    if absent:
        raise ValueError(f"the model has no {', '.join(absent)}; it has {', '.join(found)}")
    for group, parameters in found.items():
        for parameter in parameters:
            parameter.requires_grad_(group in wanted)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """group -> (parameters that train, parameters in all)."""
    return {
        group: (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
        for group, parameters in grouped_parameters(model).items()
    }


def linear_modules(model: nn.Module, groups: Collection[str]) -> list[str]:
    """Full names of the linear layers of the groups, the output head left out: what LoRA adapts."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and group_of(name) in groups and not name.endswith("lm_head")
    ]
