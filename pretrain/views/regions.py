"""Where two crops of an image overlap, and the patch features of both there, bin by bin: ROI-Align by two matrix products.

A view's patch features stand at the centres of its patches. Between the centres they are interpolated linearly; beyond the
outermost ones there is nothing to interpolate. So the overlap of two views is that of the rectangles through their outermost
centres (each view inset by half a patch): no bin ever reads a repeated border, and features that are linear in the image's
coordinates come out the same from both views, flips included.
"""

import torch
from torch import Tensor

from pretrain.views.boxes import Views

Grid = tuple[int, int]


def inset(boxes: Tensor, grid: Grid) -> Tensor:
    """Boxes [..., 4] shrunk by half a patch of a view of ``grid`` (h, w) patches, on each side."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    dx, dy = (x1 - x0) / (2 * grid[1]), (y1 - y0) / (2 * grid[0])
    return torch.stack([x0 + dx, y0 + dy, x1 - dx, y1 - dy], -1)


def overlaps(views: Views, global_grid: Grid, local_grid: Grid, min_patches: float) -> tuple[Tensor, Tensor]:
    """The overlap of every global crop with every local one.

    Args:
        views: of B images.
        global_grid, local_grid: (h, w), patches of a crop.
        min_patches: sides that are narrower, in patches of either view, are no overlap.

    Returns:
        boxes [B, G, L, 4] in image units (where there is no overlap: that of the whole image), and which of them are
        overlaps, [B, G, L] bool.
    """
    boxes = views.boxes
    first = inset(boxes[:, : views.n_global], global_grid).unsqueeze(2)  # [B, G, 1, 4]
    second = inset(boxes[:, views.n_global :], local_grid).unsqueeze(1)  # [B, 1, L, 4]
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    patch = torch.maximum(
        _patch(boxes[:, : views.n_global], global_grid).unsqueeze(2), _patch(boxes[:, views.n_global :], local_grid).unsqueeze(1)
    )
    are = ((high - low) >= min_patches * patch).all(-1)
    regions = torch.cat([low, high], -1)
    return torch.where(are.unsqueeze(-1), regions, regions.new_tensor([0.0, 0.0, 1.0, 1.0])), are


def read_regions(patches: Tensor, grid: Grid, boxes: Tensor, flips: Tensor, regions: Tensor, n_bins: int, n_samples: int) -> Tensor:
    """Patch features of views at regions of the image, averaged over a regular grid of points in each bin.

    Equal to torchvision's ``roi_align(aligned=True, sampling_ratio=n_samples)`` on the view's feature map, and deterministic in
    the backward pass. The bins of a flipped view are turned back: rows and columns are the image's.

    Args:
        patches: [V, N, D], row-major.
        grid: (h, w), N = h * w.
        boxes, flips: [V, 4] in image units and [V] bool, of the views.
        regions: [V, K, 4] in image units.

    Returns:
        [V, K, n_bins^2, D], in the dtype of ``patches``.
    """
    rows = _bin_weights(boxes[:, 1], boxes[:, 3], regions[..., 1], regions[..., 3], grid[0], n_bins, n_samples)  # [V, K, n, h]
    columns = _bin_weights(boxes[:, 0], boxes[:, 2], regions[..., 0], regions[..., 2], grid[1], n_bins, n_samples)
    columns = torch.where(flips[:, None, None, None], columns.flip(-1), columns)
    maps = patches.unflatten(1, grid).to(torch.promote_types(patches.dtype, torch.float32))  # [V, h, w, D]
    with torch.autocast(patches.device.type, enabled=False):
        n_views, n_regions = regions.shape[:2]
        half = rows.to(maps.dtype).flatten(1, 2) @ maps.flatten(2)  # [V, K n, w D]
        half = half.view(n_views, n_regions, n_bins, grid[1], -1)
        whole = columns.to(maps.dtype).unsqueeze(2) @ half  # [V, K, 1, n, w] @ [V, K, n, w, D]
    return whole.flatten(2, 3).to(patches.dtype)


def _bin_weights(low: Tensor, high: Tensor, start: Tensor, end: Tensor, n_patches: int, n_bins: int, n_samples: int) -> Tensor:
    """Weights [V, K, n_bins, n_patches] of an axis: linear interpolation between patch centres, averaged over each bin's points."""
    steps = (torch.arange(n_bins * n_samples, device=low.device, dtype=low.dtype) + 0.5) / (n_bins * n_samples)
    points = start.unsqueeze(-1) + steps * (end - start).unsqueeze(-1)  # [V, K, n s], image units
    size = (high - low)[:, None, None]
    at = ((points - low[:, None, None]) / size * n_patches - 0.5).clamp(0, n_patches - 1)  # in patch centres
    centres = torch.arange(n_patches, device=low.device, dtype=low.dtype)
    weights = (1 - (at.unsqueeze(-1) - centres).abs()).clamp(min=0)  # [V, K, n s, n_patches]
    return weights.unflatten(2, (n_bins, n_samples)).mean(3)


def _patch(boxes: Tensor, grid: Grid) -> Tensor:
    """Width and height of a patch, [..., 2], in image units."""
    return (boxes[..., 2:] - boxes[..., :2]) / boxes.new_tensor([grid[1], grid[0]])
