"""Change the patch size: resample the patch projection by a pseudo-inverse (FlexiViT, Beyer et al., 2023,
section 3.4)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint

KERNEL = "patch_embed.proj.weight"


def resize_matrix(old_px: int, new_px: int) -> Tensor:
    """R [new^2, old^2], float64: the bicubic (antialiased) resize of a patch of ``old_px`` to ``new_px``
    pixels a side."""
    units = torch.eye(old_px**2, dtype=torch.float64).view(-1, 1, old_px, old_px)
    return F.interpolate(units, size=(new_px, new_px), mode="bicubic", antialias=True).flatten(1).T


def resize_kernel(kernel: Tensor, new_px: int) -> Tensor:
    """The kernel v that responds to a resized patch R x as the kernel w responds to x.

    v = (R^T)^+ w minimizes the error of <R x, v> = <x, w> over all x. It is exact if ``new_px`` is at least
    the old size.

    Args:
        kernel: [D, C, p, p].

    Returns:
        [D, C, new_px, new_px], in the kernel's dtype.
    """
    old_px = kernel.shape[-1]
    if old_px == new_px:
        return kernel
    inverse = torch.linalg.pinv(resize_matrix(old_px, new_px).T)  # [new^2, old^2]
    resized = kernel.double().flatten(2) @ inverse.T  # [D, C, new^2]
    return resized.unflatten(2, (new_px, new_px)).to(kernel.dtype)


def with_patch_size(checkpoint: Checkpoint, new_px: int) -> Checkpoint:
    """The same network for patches of ``new_px`` pixels. Its grid of positions stays and is resampled as
    usual."""
    old_px = checkpoint.model_kwargs["patch_size"]
    if new_px < 1:
        raise UserError(f"patch_size: {new_px} px is no patch")
    if old_px == new_px:
        return checkpoint
    state = {**checkpoint.state, KERNEL: resize_kernel(checkpoint.state[KERNEL], new_px)}
    provenance = {**checkpoint.provenance, "patch_size_before": old_px}
    return replace(
        checkpoint,
        state=state,
        model_kwargs={**checkpoint.model_kwargs, "patch_size": new_px},
        provenance=provenance,
    )
