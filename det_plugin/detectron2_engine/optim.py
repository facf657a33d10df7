"""Parameter groups of a Detectron2 detector: ViTDet's layer decay and weight decay, for every tensor of our
ViT.

Of all positions and tokens, Detectron2's ``get_vit_lr_decay_rate`` only knows ``pos_embed``. It would give
position fields, registers and [CLS] the full learning rate, 100 times that of the patch embedding. Its
``overrides`` match the last part of a name.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.solver import get_default_optimizer_params
from torch import nn

from pretrain.layer_decay import lr_rate

VIT = "backbone.net.vit."
# Without weight decay, besides norms: by the last part of the name, as Detectron2's overrides are.
NO_DECAY = ("pos_embed", "pos_field", "cls_pos", "gamma")


def lr_factor(name: str, *, depth: int, decay: float) -> float:
    """The factor on a parameter's learning rate, by its name in the detector; 1 outside the ViT."""
    return lr_rate(name.removeprefix(VIT), depth, decay) if name.startswith(VIT) else 1.0


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    layer_decay: float,
    weight_decay_norm: float | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Detectron2's ``get_default_optimizer_params`` with :func:`lr_factor`, for the network's own depth.

    Args:
        model: a detector around a :class:`RegistryBackbone`. Launchers set it.
        weight_decay_norm: weight decay of norms.
        overrides: last part of a name -> ``{"weight_decay": ..., "lr": ...}``.
    """
    blocks = model.get_submodule(VIT + "blocks")
    factor = partial(lr_factor, depth=len(list(blocks.children())), decay=layer_decay)
    own = {key: dict(value) for key, value in (overrides or {}).items()}
    how = dict[str, Any](weight_decay_norm=weight_decay_norm, lr_factor_func=factor, overrides=own)
    return get_default_optimizer_params(model, base_lr=base_lr, **how)


def adamw(
    params: Any, *, lr: float, betas: Sequence[float], weight_decay: float, clip_grad: float = 0.0
) -> torch.optim.AdamW:
    """AdamW from plain numbers: torch's ``weights_only`` would refuse a config's lists in checkpoints.

    Args:
        clip_grad: largest norm of all gradients together, also for stock launchers; 0: no clipping.
    """
    optimizer = torch.optim.AdamW(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay)  # type: ignore
    if clip_grad > 0:
        optimizer.register_step_pre_hook(partial(_clip, max_norm=clip_grad))
    return optimizer


def _clip(optimizer: torch.optim.Optimizer, *_: Any, max_norm: float) -> None:
    """Before a step. Under AMP, ``GradScaler.step`` unscales the gradients before it."""
    nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), max_norm)
