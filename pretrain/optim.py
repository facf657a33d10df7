"""AdamW: settings, parameter groups and the schedules that drive them; clipping; a teacher's average."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.distributed import local, whole
from pretrain.settings import Settings, setting

Beta = Annotated[float, Field(ge=0, le=1 - 1e-9)]


class OptimSettings(Settings):
    """AdamW and its schedules."""

    epochs: int = setting(100, "length of the run in epochs", source="Table 6", ge=1)
    batch_size: int = setting(512, "images of a step over all ranks", source="Table 6", ge=1)
    epoch_iters: int = setting(0, "iterations of an epoch; 0: images / batch_size", ge=0)
    base_lr: float = setting(2.0e-3, "lr before lr_rule", source="Table 6", ge=0)
    head_lr_factor: float = setting(
        1.0, "lr of all that is not the backbone, in that of the backbone (NeCo: 10)", source="DINOv2", ge=0
    )
    lr_rule: Literal["sqrt_1024", "linear_256", "none"] = setting(
        "sqrt_1024", "peak lr: base * sqrt(batch / 1024) | base * batch / 256 | base", source="DINOv2"
    )
    min_lr: float = setting(1.0e-6, "lr at the end of the cosine", source="DINOv2", ge=0)
    warmup_epochs: int = setting(10, "linear warm-up in epochs", source="Table 6", ge=0)
    weight_decay: float = setting(0.04, "weight decay at the start", source="Table 6", ge=0)
    weight_decay_end: float = setting(0.4, "weight decay at the end, cosine", source="Table 6", ge=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "of AdamW", source="DINOv2")
    clip_grad: float = setting(
        3.0, "largest gradient norm of the backbone and of each head; 0: none", source="DINOv2", ge=0
    )


class TeacherOptimSettings(OptimSettings):
    """The same of a method whose teacher is a moving average of the student."""

    teacher_momentum: float = setting(
        0.992, "of its average, at the start; 1 to the end: it stays what it is", source="Table 6", ge=0, le=1
    )
    teacher_momentum_end: float = setting(1.0, "at the end, cosine", source="DINOv2", ge=0, le=1)


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: not on biases, norms and LayerScale (DINOv2)."""
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)


def parameter_groups(
    network: nn.Module, head_lr_factor: float = 1.0, frozen_epochs: Callable[[str], int] = lambda name: 0
) -> list[dict[str, Any]]:
    """Groups of the parameters that learn, by weight decay, backbone or head, and how long they are frozen.

    Args:
        network: ``backbone`` and heads.
        head_lr_factor: lr of all that is not the backbone, in that of the backbone.
        frozen_epochs: of a parameter's name: epochs at the start during which its lr is 0.

    Returns:
        groups that :func:`set_schedules` reads: each carries ``decays``, ``lr_factor`` and ``frozen_epochs``.
    """
    groups: dict[tuple[bool, bool, int], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            kind = decays(name), not name.startswith("backbone."), frozen_epochs(name)
            groups.setdefault(kind, []).append(parameter)
    factors = {True: head_lr_factor, False: 1.0}
    return [
        {"params": p, "decays": decay, "lr_factor": factors[is_head], "frozen_epochs": frozen}
        for (decay, is_head, frozen), p in groups.items()
    ]


def empty_state(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state before its first step, as tensors that a checkpoint can be read into."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            device = p.device if group["fused"] else "cpu"
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def set_schedules(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, epoch: int) -> None:
    """This iteration's values into the groups of :func:`parameter_groups`; ``epoch``: whole epochs done."""
    for group in optimizer.param_groups:
        group["lr"] = (0.0 if epoch < group["frozen_epochs"] else lr) * group["lr_factor"]
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
        norm = whole(norm)
        # A device would have to be waited for: there all is multiplied, by 1 where the norm is small enough.
        if max_norm > 0 and (norm.device.type != "cpu" or norm > max_norm):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norms.append(norm)
    return torch.stack(norms).square().sum().sqrt()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for every parameter (this rank's shard)."""
    ours, theirs = ([local(p) for p in network.parameters()] for network in (teacher, student))
    torch._foreach_lerp_(ours, theirs, 1 - momentum)
