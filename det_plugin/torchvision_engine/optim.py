"""AdamW with layer decay, and the learning rate of an iteration."""

import bisect
from typing import Any

import torch
from torch import nn

from det_plugin.protocol import DetectionProtocol
from pretrain.layer_decay import lr_rate, no_decay

VIT = "backbone.vit."


def lr_at(it: int, protocol: DetectionProtocol) -> float:
    """The base lr of iteration ``it`` (from 0): linear warm-up, then steps at milestones (Detectron2)."""

    def steps(at: int) -> float:
        return protocol.lr * protocol.lr_gamma ** bisect.bisect_right(protocol.milestones, at)

    if it >= protocol.warmup_iters:
        return steps(it)
    start, end = protocol.warmup_factor * steps(0), steps(protocol.warmup_iters)
    return start + (end - start) * it / protocol.warmup_iters


def parameter_groups(model: nn.Module, protocol: DetectionProtocol) -> list[dict[str, Any]]:
    """Groups of one ``rate`` (factor on the learning rate) and one ``weight_decay``.

    The ViT has layer decay, and no weight decay on norms and positions; pyramid and heads have neither
    exception: Detectron2 does not count its channel LayerNorm among the norms.
    """
    depth = len(model.get_submodule(VIT + "blocks"))  # type: ignore[arg-type]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay = 1.0, protocol.weight_decay
        if name.startswith(VIT):
            own = name.removeprefix(VIT)
            rate = lr_rate(own, depth, protocol.layer_decay)
            decay = 0.0 if no_decay(own) else decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "rate": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def build_optimizer(model: nn.Module, protocol: DetectionProtocol) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; :func:`set_lr` gives the rates."""
    return torch.optim.AdamW(
        parameter_groups(model, protocol), lr=protocol.lr, betas=protocol.betas, fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """``lr`` times each group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
