"""Change a network that was read: its patch size, its pixel normalization, its positions.

The patch projection is resampled by a pseudo-inverse (FlexiViT, Beyer et al., 2023, section 3.4). Another
pixel normalization is folded into it, so that every backbone takes ImageNet's. A learned grid of positions
becomes a position field, so that a public network can continue with crop-tied positions (ours).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.backbones.position import FIELD_INTERPOLATIONS, axis_weights, patch_centers
from pretrain.errors import UserError, ensure
from pretrain.views.pixels import MEAN, STD
from pretrain.weights.common import Checkpoint, State

KERNEL = "patch_embed.proj.weight"
BIAS = "patch_embed.proj.bias"
# Fewest samples of a field for each cell of its grid. With fewer, the finest waves of the grid fall between
# the samples. The field then overshoots elsewhere to meet them at the patches: by a factor of 50 at one
# sample a cell, by less than 2 from here on.
SAMPLES_A_CELL = Fraction(4, 3)


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
    kernel = {KERNEL: resize_kernel(checkpoint.state[KERNEL], new_px)}
    return _with(checkpoint, kernel, {"patch_size": new_px}, patch_size_before=old_px)


def _with(
    checkpoint: Checkpoint, state: State, model_kwargs: dict[str, Any], **provenance: Any
) -> Checkpoint:
    """With these entries instead of its own."""
    return replace(
        checkpoint,
        state={**checkpoint.state, **state},
        model_kwargs={**checkpoint.model_kwargs, **model_kwargs},
        provenance={**checkpoint.provenance, **provenance},
    )


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
    means, stds = _channels(checkpoint, mean, "mean"), _channels(checkpoint, std, "standard deviation")
    place = f"weights: {checkpoint.path}"
    ensure(min(stds) > 0, f"{place}: pixels with a standard deviation of {stds}")
    theirs, ours = (torch.tensor(pair, dtype=torch.float64) for pair in ([means, stds], [MEAN, STD]))
    if KERNEL not in checkpoint.state or torch.allclose(theirs, ours, rtol=0, atol=1e-6):
        return checkpoint
    kernel = checkpoint.state[KERNEL].double()
    is_rgb = kernel.ndim == 4 and kernel.shape[1] == 3
    ensure(is_rgb, f"{place}: {KERNEL} is {tuple(kernel.shape)}, not of three channels")
    shift = torch.einsum("dcij,c->d", kernel, (ours[0] - theirs[0]) / theirs[1])
    scaled = kernel * (ours[1] / theirs[1]).view(3, 1, 1)
    bias = checkpoint.state[BIAS].double() + shift if BIAS in checkpoint.state else shift
    state = {KERNEL: scaled.float(), BIAS: bias.float()}
    return _with(checkpoint, state, {}, pixel_mean_before=means, pixel_std_before=stds)


def _channels(checkpoint: Checkpoint, value: Any, name: str) -> list[float]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    if len(values) != 3 or not all(isinstance(v, int | float) and abs(v) < 1e3 for v in values):
        raise UserError(f"weights: {checkpoint.path}: pixels with a {name} of {value!r}, not three numbers")
    return [float(v) for v in values]


def grid_to_field(n_cells: int, n_samples: int, interpolation: str = "bicubic") -> Tensor:
    """A [F, G], float64: maps the cells of a grid to the samples of a field along one axis. Reading the field
    gives them back.

    R [G, F] reads the field at the centers of G patches (:func:`pretrain.backbones.position.axis_weights`). A
    smooth resampling S of the cells, bicubic with replicated borders, is nearly its inverse. The smallest
    change makes it one: A = S + R^+ (1 - R S), so that R A = 1.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    read = axis_weights(patch_centers(zero, zero + 1, n_cells)[0], n_samples, interpolation)
    # of the image, where the field's samples stand
    corners = torch.arange(n_samples, dtype=torch.float64) / (n_samples - 1)
    # the same between the centers of the outermost cells
    cells = (corners * n_cells - 0.5) / max(n_cells - 1, 1)
    smooth = axis_weights(cells, n_cells)
    return smooth + torch.linalg.pinv(read) @ (torch.eye(n_cells, dtype=torch.float64) - read @ smooth)


def with_position_field(checkpoint: Checkpoint, size: int, interpolation: str = "bicubic") -> Checkpoint:
    """The same network with a position field in place of its learned grid. A network that has a field stays
    as it is.

    The function is the same on whole images of the grid's own size. At other sizes the field continues the
    grid smoothly. It equals no public rule for resampling grids; those differ from each other, too.

    Args:
        size: F, samples per side of the field.
        interpolation: how the field is read, ``bicubic`` | ``bilinear``.

    Raises:
        UserError: the network has no positions; the field is too small for the grid; fields have no such
            interpolation.
    """
    model_kwargs, path = checkpoint.model_kwargs, checkpoint.path
    encoding = model_kwargs.get("pos_encoding", "standard")
    if encoding == "field":
        return checkpoint
    none = "has no absolute positions of which positions.encoding=field could make a field"
    ensure(encoding == "standard", f"weights: {path} {none}")
    known = f"is none of {FIELD_INTERPOLATIONS} for a position field"
    ensure(
        interpolation in FIELD_INTERPOLATIONS, f"config: positions.interpolation={interpolation!r} {known}"
    )
    n_cls, side = int(model_kwargs["has_cls"]), model_kwargs["pos_grid"]
    least = math.ceil(side * SAMPLES_A_CELL)
    small = f"is too small a field for the {side} x {side} positions of {path}; it takes {least}"
    ensure(size >= least, f"config: positions.grid={size} {small}")
    along = grid_to_field(side, size, interpolation)  # [F, G]
    positions = checkpoint.state["pos_embed"]  # [1, 1 + G * G, D]
    grid = positions[0, n_cls:].double().T.unflatten(1, (side, side))  # [D, G, G]
    state = {"pos_field": (along @ grid @ along.T).unsqueeze(0).to(positions.dtype)}  # [1, D, F, F]
    if n_cls:
        state["cls_pos"] = positions[:, :1].clone()
    became = f"its {side} x {side} positions become a field of {size} x {size} samples"
    said = f"weights: {path}: {became}; the network is the same at {side} x {side} patches alone"
    warnings.warn(said, stacklevel=2)
    gridless = replace(checkpoint, state={k: v for k, v in checkpoint.state.items() if k != "pos_embed"})
    own = {"pos_encoding": "field", "pos_grid": size, "pos_interpolation": interpolation}
    return _with(gridless, state, own, pos_grid_before=side)
