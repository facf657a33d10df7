"""AdamW over the student: parameter groups and the schedules that drive them; clipping; the teacher's moving average."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: not on biases, norms and LayerScale (DINOv2)."""
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups by (weight decay, head, last layer of a head); each carries ``decays``, ``is_head`` and ``is_last_layer``."""
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = decays(name), not name.startswith("backbone."), "last_layer" in name
            groups.setdefault(kind, []).append(parameter)
    return [{"params": p, "decays": decay, "is_head": head, "is_last_layer": last} for (decay, head, last), p in groups.items()]


def empty_state(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state before its first step, as tensors that a checkpoint can be read into."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            device = p.device if group["fused"] else "cpu"
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }


def set_schedules(
    optimizer: torch.optim.Optimizer, lr: float, last_layer_lr: float, weight_decay: float, head_lr_factor: float = 1.0
) -> None:
    """This iteration's values into the groups; ``head_lr_factor`` multiplies the lr of all that is not the backbone."""
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * (head_lr_factor if group["is_head"] else 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def clip_gradients(networks: nn.ModuleDict, max_norm: float) -> Tensor:
    """Clip each network's gradient norm by itself (backbone and each head apart, as DINOv2); 0 clips nothing.

    Returns:
        the norm of all gradients before clipping, a scalar on the device.
    """
    norms = []
    for module in networks.values():
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # A device would have to be waited for: there everything is multiplied, by 1 where the norm is small enough.
        if max_norm > 0 and (norm.device.type != "cpu" or norm > max_norm):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norms.append(norm)
    return torch.stack(norms).square().sum().sqrt()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for every parameter (of a sharded one, this rank's shard)."""
    ours, theirs = _local(teacher.parameters()), _local(student.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


def _local(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
