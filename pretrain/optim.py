"""AdamW over the student: parameter groups and the schedules that drive them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: not on biases, norms and LayerScale (DINOv2)."""
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups by (weight decay, last layer of a head); each carries ``decays`` and ``is_last_layer``."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((decays(name), "last_layer" in name), []).append(parameter)
    return [{"params": p, "decays": decay, "is_last_layer": last} for (decay, last), p in groups.items()]


def set_schedules(optimizer: torch.optim.Optimizer, lr: float, last_layer_lr: float, weight_decay: float) -> None:
    """This iteration's values into the groups."""
    for group in optimizer.param_groups:
        group["lr"] = last_layer_lr if group["is_last_layer"] else lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def clip_gradients(modules: Iterable[nn.Module], max_norm: float) -> None:
    """Clip each module's gradient norm by itself (backbone and each head apart, as DINOv2); 0 clips nothing."""
    if max_norm > 0:
        for module in modules:
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for every parameter."""
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1 - momentum)
