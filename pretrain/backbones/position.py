"""Position embeddings of a view: a vector field cropped together with the image (paper 3.2.1, METHOD.md 2).

The field P [D, h_p, w_p] is aligned with the image's corners: its sample (r, c) stands at the image point (c
/ (w_p - 1), r / (h_p - 1)), in image units [0, 1]. The embedding of a patch is P interpolated at the patch's
center. The patches of one view form a regular grid, so the interpolation is separable, R_y P R_x^T with one
small weight matrix an axis: two matrix products, the same on CPU and GPU, and deterministic in the backward
pass (an index-gather is not).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.precision import at_least_float32
from pretrain.views.resample import keys

FIELD_INTERPOLATIONS = ("bicubic", "bilinear")
GRID_INTERPOLATIONS = ("dinov2", "bicubic", "bicubic_antialias", "bilinear_antialias")


def axis_weights(points: Tensor, n_samples: int, interpolation: str = "bicubic") -> Tensor:
    """Weights that interpolate ``n_samples`` corner-aligned samples at ``points``; borders are replicated.

    Args:
        points: [..., L] positions along one axis in image units; values outside [0, 1] read the replicated
            border.
        n_samples: number of samples of the field along this axis (>= 2).
        interpolation: ``bicubic`` (Keys, a = -0.5) or ``bilinear``.

    Returns:
        [..., L, n_samples], rows summing to 1.
    """
    assert interpolation in FIELD_INTERPOLATIONS, interpolation
    at = (points.clamp(0, 1) * (n_samples - 1)).unsqueeze(-1)  # [..., L, 1] in samples
    # Two virtual samples beyond each end take the kernel's tails; their weights go to the border sample.
    samples = torch.arange(-2, n_samples + 2, device=points.device, dtype=points.dtype)
    distance = at - samples
    # Keys' cubic kernel with a = -1/2 is the only one that reproduces quadratics, hence linear fields,
    # exactly. [..., L, n_samples + 4]
    weights = keys(distance) if interpolation == "bicubic" else (1 - distance.abs()).clamp(min=0)
    first, last = weights[..., :2].sum(-1, keepdim=True), weights[..., -2:].sum(-1, keepdim=True)
    return weights[..., 2:-2] + F.pad(first, (0, n_samples - 1)) + F.pad(last, (n_samples - 1, 0))


def patch_centers(low: Tensor, high: Tensor, n_patches: int, mirrored: Tensor | None = None) -> Tensor:
    """Centers of ``n_patches`` patches from ``low`` to ``high`` [V] on an axis: [V, n_patches], image units.

    Where ``mirrored`` [V] is true, the order is reversed: patch j of a flipped view sits where patch n - 1 -
    j was.
    """
    steps = (torch.arange(n_patches, device=low.device, dtype=low.dtype) + 0.5) / n_patches  # [n]
    if mirrored is not None:
        steps = torch.where(mirrored.unsqueeze(-1), steps.flip(0), steps)  # [V, n]
    return low.unsqueeze(-1) + steps * (high - low).unsqueeze(-1)


def sample_field(
    field: Tensor,
    boxes: Tensor,
    grid: tuple[int, int],
    flips: Tensor | None = None,
    interpolation: str = "bicubic",
) -> Tensor:
    """Position embeddings of views: the field at the center of every patch (METHOD.md 2).

    Args:
        field: [1, D, h_p, w_p], corners aligned with the image's corners.
        boxes: [V, 4] (x0, y0, x1, y1) in image units.
        grid: (h, w), patches a view.
        flips: [V] bool, horizontal flips; None: no view is flipped.
        interpolation: ``bicubic`` or ``bilinear``.

    Returns:
        [V, h * w, D], row-major, in the field's dtype.
    """
    height, width = grid
    boxes = boxes.to(field.device, torch.promote_types(field.dtype, torch.float32))
    flips = None if flips is None else flips.to(field.device)
    x = patch_centers(boxes[:, 0], boxes[:, 2], width, flips)
    y = patch_centers(boxes[:, 1], boxes[:, 3], height)
    # half a patch is 1% of an axis: keep float32
    with torch.autocast(device_type=field.device.type, enabled=False):
        r_x = axis_weights(x, field.shape[3], interpolation).to(field.dtype)  # [V, w, w_p]
        r_y = axis_weights(y, field.shape[2], interpolation).to(field.dtype)  # [V, h, h_p]
        # Two plain products with D innermost, so that nothing large is ever transposed.
        samples = field[0].permute(1, 2, 0)  # [h_p, w_p, D]
        rows = r_y.flatten(0, 1) @ samples.flatten(1)  # [V * h, w_p * D]
        # [V, 1, w, w_p] @ [V, h, w_p, D]
        sampled = r_x.unsqueeze(1) @ rows.view(len(boxes), height, *samples.shape[1:])
    return sampled.flatten(1, 2)


def started_field(noise: Tensor, init: str, n_coarse: int, scale: float) -> Tensor:
    """What a field starts as (ours, METHOD.md 2), given the white noise that :class:`ViT` starts it with.

    Nothing more is drawn, so all other weights of a network are the same whatever the start.

    Args:
        noise: [1, D, F, F].
        init: ``normal``: the noise. ``smooth``: its first ``n_coarse`` x ``n_coarse`` samples, spread over the
            whole field by the bicubic kernel that reads fields, with the noise's standard deviation.
            ``sincos``: MAE's table, a sample being its unit: waves of 2 pi samples and longer.
        n_coarse: from 2 to F.
        scale: amplitude of the waves.

    Returns:
        [1, D, F, F], in the dtype of ``noise``.
    """
    width, side = noise.shape[1], noise.shape[3]
    if init == "sincos":
        return scale * sincos_table(side, width).T.unflatten(1, (side, side)).unsqueeze(0).to(noise)
    if init == "smooth":
        points = torch.linspace(0, 1, side, device=noise.device, dtype=noise.dtype)  # where samples stand
        along = axis_weights(points, n_coarse)  # [F, n_coarse]
        smooth = along @ noise[..., :n_coarse, :n_coarse] @ along.T
        return smooth * (noise.std() / smooth.std())
    assert init == "normal", init
    return noise


def resample_grid(grid_embed: Tensor, grid: tuple[int, int], interpolation: str = "dinov2") -> Tensor:
    """A ViT's learned grid of position embeddings at another size.

    Args:
        grid_embed: [1, G_h, G_w, D].
        grid: (h, w) wanted.
        interpolation: which public variant: ``dinov2`` (bicubic by scale factor (n + 0.1) / G; DINO and
            DINOv2), ``bicubic`` (by size; Hugging Face), ``bicubic_antialias`` (by size; timm, DINOv2 with
            registers), ``bilinear_antialias`` (by size; LOCA: jax.image.resize).

    Returns:
        [1, h * w, D].
    """
    assert interpolation in GRID_INTERPOLATIONS, interpolation
    full, (g_h, g_w) = at_least_float32(grid_embed), grid_embed.shape[1:3]
    if (g_h, g_w) == tuple(grid):
        return grid_embed.flatten(1, 2)
    # Resampling is linear: resample the G_h * G_w unit grids once, without gradient. The rest is a matrix
    # product, whose backward pass is deterministic everywhere; that of bicubic interpolation is not on CUDA.
    with torch.no_grad(), torch.autocast(device_type=grid_embed.device.type, enabled=False):
        units = torch.eye(g_h * g_w, device=full.device, dtype=full.dtype).view(1, -1, g_h, g_w)
        if interpolation == "dinov2":
            scale = tuple((n + 0.1) / g for n, g in zip(grid, (g_h, g_w)))
            maps = F.interpolate(units, scale_factor=scale, mode="bicubic")
            assert tuple(maps.shape[2:]) == tuple(grid), (maps.shape, grid)
        else:
            mode, _, antialias = interpolation.partition("_")
            maps = F.interpolate(units, size=grid, mode=mode, antialias=bool(antialias))
        weights = maps.flatten(2)[0]  # [G_h * G_w, h * w]
    with torch.autocast(device_type=grid_embed.device.type, enabled=False):
        return (weights.T @ full.flatten(1, 2)).to(grid_embed.dtype)


def sincos_table(side: int, width: int) -> Tensor:
    """MAE's fixed positions, [side^2, width], float64: half of the width for the column, half for the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64).unsqueeze(1) * frequencies  # [side, width / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    # [side, side, width / 2]
    columns, rows = (
        axis.expand(side, -1, -1),
        axis.unsqueeze(1).expand(-1, side, -1),
    )
    return torch.cat([columns, rows], dim=2).flatten(0, 1)
