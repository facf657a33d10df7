"""The overlap of two crops of an image, and the patch features of both in its bins: ROI-Align by matrices.

A view's patch features are located at the centers of its patches. Between centers they are interpolated
linearly; beyond the outermost ones there is nothing to interpolate. So the overlap of two views is that of
the rectangles through their outermost centers (each view is inset by half a patch). No bin ever reads a
repeated border, and features that are linear in the image's coordinates are equal in both views, flips
included, in every bin.

Two crops of one box (``crops.local_rule=same``) need no inset if no point lies beyond their outermost
centers, that is, for n_bins * n_samples <= h: over the whole box, h bins of one point are the patches
themselves.
"""

import torch
from torch import Tensor

from pretrain.views.boxes import Views

Grid = tuple[int, int]

# Patches: float32 boxes; a local crop of 3 x 3 patches inside its global one overlaps it by 2, not by
# 1.9999999
TOLERANCE = 1e-3


def inset(boxes: Tensor, grid: Grid) -> Tensor:
    """Boxes [..., 4] shrunk by half a patch of a view of ``grid`` (h, w) patches, on each side."""
    half = _patch(boxes, grid) / 2
    return torch.cat([boxes[..., :2] + half, boxes[..., 2:] - half], -1)


def overlaps(views: Views, global_grid: Grid, local_grid: Grid, min_patches: float) -> tuple[Tensor, Tensor]:
    """The overlap of every global crop with every local one.

    Args:
        views: of B images.
        global_grid, local_grid: (h, w), patches of a crop.
        min_patches: narrower sides, in patches of either view, do not count as an overlap; more than 0.

    Returns:
        boxes [B, G, L, 4] in image units (the whole image if there is no overlap), and which of them are
        overlaps, [B, G, L] bool.
    """
    boxes = views.boxes
    # [B, G, 1, 4], [B, 1, L, 4]
    first, second = (boxes[:, : views.n_global].unsqueeze(2), boxes[:, views.n_global :].unsqueeze(1))
    # [B, G, L, 2], the larger of the two
    patch = torch.maximum(_patch(first, global_grid), _patch(second, local_grid))
    first, second = inset(first, global_grid), inset(second, local_grid)
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    are = ((high - low) >= (min_patches - TOLERANCE) * patch).all(-1)
    whole = torch.cat([boxes.new_zeros(2), boxes.new_ones(2)])  # filled there: no copy to wait for
    return torch.where(are.unsqueeze(-1), torch.cat([low, high], -1), whole), are


def read_regions(
    patches: Tensor, grid: Grid, boxes: Tensor, flips: Tensor, regions: Tensor, n_bins: int, n_samples: int
) -> Tensor:
    """Patch features of views at regions of the image, averaged over a regular grid of points in each bin.

    Equal to torchvision's ``roi_align(aligned=True, sampling_ratio=n_samples)`` on the view's feature map,
    and deterministic in the backward pass. The bins of a flipped view are mirrored back: rows and columns are
    the image's. Regions outside a view read its border. Products are in float32 (float64) even for bfloat16
    maps, whose eight bits are too few for a bin's weights. The backward pass keeps only the weights.
    Temporary memory: a copy of maps that are not float32, and V * K * n_bins * w * D values.

    Args:
        patches: [V, N, D], row-major.
        grid: (h, w), N = h * w.
        boxes, flips: [V, 4] in image units and [V] bool, of the views.
        regions: [V, K, 4] in image units.

    Returns:
        [V, K, n_bins^2, D], in the dtype of ``patches``.
    """
    columns, rows = (  # [V, K, n, w] and [V, K, n, h]
        _bin_weights(boxes[:, i::2], regions[..., i::2], grid[1 - i], n_bins, n_samples) for i in (0, 1)
    )
    columns = torch.where(flips[:, None, None, None], columns.flip(-1), columns)
    maps = patches.unflatten(1, grid).to(torch.promote_types(patches.dtype, torch.float32))  # [V, h, w, D]
    with torch.autocast(patches.device.type, enabled=False):
        n_views, n_regions = regions.shape[:2]
        half = rows.to(maps.dtype).flatten(1, 2) @ maps.flatten(2)  # [V, K n, w D]
        half = half.view(n_views, n_regions, n_bins, grid[1], -1)
        whole = columns.to(maps.dtype).unsqueeze(2) @ half  # [V, K, 1, n, w] @ [V, K, n, w, D]
    return whole.flatten(2, 3).to(patches.dtype)


def _bin_weights(boxes: Tensor, regions: Tensor, n_patches: int, n_bins: int, n_samples: int) -> Tensor:
    """Weights [V, K, n_bins, n_patches] of an axis, whose ends are ``boxes`` [V, 2], ``regions`` [V, K, 2]:
    linear interpolation between patch centers, averaged over each bin's points."""
    (low, high), (start, end), n_points = boxes.unbind(-1), regions.unbind(-1), n_bins * n_samples
    steps = (torch.arange(n_points, device=low.device, dtype=low.dtype) + 0.5) / n_points
    points = start.unsqueeze(-1) + steps * (end - start).unsqueeze(-1)  # [V, K, n s], image units
    size = (high - low)[:, None, None]
    at = ((points - low[:, None, None]) / size * n_patches - 0.5).clamp(0, n_patches - 1)  # in patch centers
    centers = torch.arange(n_patches, device=low.device, dtype=low.dtype)
    weights = (1 - (at.unsqueeze(-1) - centers).abs()).clamp(min=0)  # [V, K, n s, n_patches]
    return weights.unflatten(2, (n_bins, n_samples)).mean(3)


def _patch(boxes: Tensor, grid: Grid) -> Tensor:
    """Width and height of a patch, [..., 2], in image units."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.stack([width / grid[1], height / grid[0]], -1)
