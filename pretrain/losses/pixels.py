"""Pixels as targets: an image's patches, each normalized by itself; the error where they are masked (MAE)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.precision import at_least_float32

EPS = 1e-6  # added to a patch's variance (MAE's code)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, 3, H, W] as patches [B, N, p * p * 3].

    Patches are row-major, pixels in a patch too, and a pixel's colors come last (MAE's code). H and W are
    multiples of p = ``patch_size``.
    """
    cells = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, 3, h, p, w, p]
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalized(patches: Tensor) -> Tensor:
    """Patches [..., P] with mean 0 and variance 1 each, in float32 or wider (MAE, section 3).

    The variance is unbiased, and ``EPS`` is added to it, as in MAE's code.
    """
    patches = at_least_float32(patches)
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) / (variance + EPS).sqrt()


def masked_pixel_loss(
    predictions: Tensor, images: Tensor, masked: Tensor, patch_size: int, normalize: bool = True
) -> Tensor:
    """Mean squared error of the masked patches' pixels, a scalar; visible ones do not count (MAE, section 3).

    Args:
        predictions: [B, M, p * p * 3] of the masked patches.
        images: [B, 3, H, W].
        masked: [B, M] int64, which patches these are; as many of each image.
        normalize: targets are :func:`normalized` patches, else plain ones.
    """
    targets = patchify(images, patch_size).gather(1, masked.unsqueeze(-1).expand(predictions.shape))
    targets = normalized(targets) if normalize else targets
    targets = at_least_float32(targets)
    return F.mse_loss(predictions.to(targets.dtype), targets)
