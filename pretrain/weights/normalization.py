"""Fold another pixel normalization into the patch projection, so that every backbone takes ImageNet's."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pretrain.errors import UserError
from pretrain.views.pixels import MEAN, STD
from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.patch import KERNEL

BIAS = "patch_embed.proj.bias"


def with_imagenet_pixels(checkpoint: Checkpoint, mean: Any, std: Any) -> Checkpoint:
    """A network that takes pixels normalized with ImageNet's mean m and deviation s, and gives the same
    features.

    The network was trained on (p - mean) / std = (x s + m - mean) / std, with x = (p - m) / s. Hence W' = W s
    / std for each channel and b' = b + sum W (m - mean) / std. This is exact wherever an image has pixels
    (not in its padding).

    Args:
        checkpoint: with ``patch_embed.proj`` [D, 3, p, p].
        mean, std: those of its training, for red, green, blue in [0, 1]; one number stands for all three.

    Raises:
        UserError: these are not three numbers, or a deviation is not positive.
    """
    means, stds = (
        _channels(checkpoint, value, name) for value, name in ((mean, "mean"), (std, "standard deviation"))
    )
    if min(stds) <= 0:
        raise UserError(f"weights: {checkpoint.path}: pixels with a standard deviation of {stds}")
    theirs, ours = (
        torch.tensor([means, stds], dtype=torch.float64),
        torch.tensor([MEAN, STD], dtype=torch.float64),
    )
    if KERNEL not in checkpoint.state or torch.allclose(theirs, ours, rtol=0, atol=1e-6):
        return checkpoint
    kernel = checkpoint.state[KERNEL].double()
    if kernel.ndim != 4 or kernel.shape[1] != 3:
        raise UserError(
            f"weights: {checkpoint.path}: {KERNEL} is {tuple(kernel.shape)}, not of three channels"
        )
    shift = torch.einsum("dcij,c->d", kernel, (ours[0] - theirs[0]) / theirs[1])
    scaled = kernel * (ours[1] / theirs[1]).view(3, 1, 1)
    bias = checkpoint.state[BIAS].double() + shift if BIAS in checkpoint.state else shift
    state = {**checkpoint.state, KERNEL: scaled.float(), BIAS: bias.float()}
    provenance = {**checkpoint.provenance, "pixel_mean_before": means, "pixel_std_before": stds}
    return replace(checkpoint, state=state, provenance=provenance)


def _channels(checkpoint: Checkpoint, value: Any, name: str) -> list[float]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    if len(values) != 3 or not all(isinstance(v, int | float) and abs(v) < 1e3 for v in values):
        raise UserError(f"weights: {checkpoint.path}: pixels with a {name} of {value!r}, not three numbers")
    return [float(v) for v in values]
