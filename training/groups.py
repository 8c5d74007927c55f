"""Which parameters a stage trains, by the groups of `common.parameters`."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from ..common.parameters import GROUPS, group_of


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


def split_by_rate(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Give parameters of the groups in `rates` that learning rate.

    Each group of a fresh optimizer is cut by rates; what has the optimizer's own comes first.
    """
    rate_of = {id(p): rates[group] for name, p in model.named_parameters() if (group := group_of(name)) in rates}
    kept, apart = [], []
    for options in optimizer.param_groups:
        parts: dict[float | None, list[nn.Parameter]] = {}
        for parameter in options["params"]:
            parts.setdefault(rate_of.get(id(parameter)), []).append(parameter)
        for rate, parameters in parts.items():
            changed = {**options, "params": parameters}
            if rate is None:
                kept.append(changed)
            else:
                apart.append({**changed, "lr": rate})
    optimizer.param_groups[:] = [*kept, *apart]
