"""Overlaps of crops, and patch features read in them: against torchvision's ROI-Align, and on images of
coordinates."""

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from pretrain.views.boxes import CropSettings, PositionSettings, Views, draw_views
from pretrain.views.regions import inset, overlaps, read_regions

GRIDS = [((14, 14), (6, 6)), ((37, 37), (7, 7)), ((5, 9), (8, 3))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def views_of(n_images, rule, size=(480, 640)):
    rngs = [np.random.default_rng([0, i]) for i in range(n_images)]
    views = draw_views(np.array([size] * n_images, np.float64), rule, PositionSettings(augment=False), rngs)
    return views.map(lambda x: x.double() if x.is_floating_point() else x)


def made_views(global_box, local_box, dtype=torch.float64):
    boxes = torch.tensor([[global_box, local_box]], dtype=dtype)
    return Views(boxes, torch.zeros(1, 2, dtype=torch.bool), boxes, 1)


def view_major(x):
    return x.transpose(0, 1).flatten(0, 1)


def coordinates(boxes, flips, grid):
    """What a view [V, 4] of an image that holds its coordinates has in its patches: [V, h * w, (x, y, 1)]."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
    x = torch.where(flips[:, None], x.flip(0), x)
    x = boxes[:, None, 0] + x * (boxes[:, None, 2] - boxes[:, None, 0])
    y = boxes[:, None, 1] + y * (boxes[:, None, 3] - boxes[:, None, 1])
    x, y = x[:, None, :].expand(-1, grid[0], -1), y[:, :, None].expand(-1, -1, grid[1])
    return torch.stack([x, y, torch.ones_like(x)], -1).flatten(1, 2)


@pytest.mark.parametrize("n_bins, n_samples", [(7, 2), (3, 1), (5, 3)])
@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (5, 9)])
def test_reading_is_roi_align(grid, n_bins, n_samples):
    """In value and gradient, on unflipped views; regions up to the view's edges, beyond its outermost
    patch centers."""
    n_views, n_regions, dim = 3, 4, 5
    maps = torch.randn(n_views, grid[0] * grid[1], dim, dtype=torch.float64)
    corner = torch.rand(n_views, 2, dtype=torch.float64) * 0.4
    boxes = torch.cat([corner, corner + 0.2 + 0.4 * torch.rand(n_views, 2, dtype=torch.float64)], 1)
    size = (boxes[:, 2:] - boxes[:, :2])[:, None]
    low, high = (0.4 * torch.rand(n_views, n_regions, 2, dtype=torch.float64) + x for x in (0, 0.6))
    low[0, 0], high[0, 0] = 0, 1  # the whole view
    regions = boxes[:, None, :2].repeat(1, 1, 2) + torch.cat([low, high], -1) * size.repeat(1, 1, 2)
    of_patches = torch.cat([low, high], -1) * torch.tensor([grid[1], grid[0]] * 2)
    weights, grads, read = torch.randn(n_views, n_regions, n_bins**2, dim, dtype=torch.float64), [], []
    for ours in (True, False):
        x = maps.clone().requires_grad_()
        if ours:
            flips = torch.zeros(n_views, dtype=torch.bool)
            read.append(read_regions(x, grid, boxes, flips, regions, n_bins, n_samples))
        else:
            planes = x.transpose(1, 2).unflatten(2, grid)
            aligned = roi_align(planes, list(of_patches), (n_bins, n_bins), 1.0, n_samples, aligned=True)
            read.append(aligned.flatten(2).transpose(1, 2).unflatten(0, (n_views, n_regions)))
        (read[-1] * weights).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*read)
    torch.testing.assert_close(*grads)
    assert read[0].std() > 0.1


@pytest.mark.parametrize("rule", ["image", "inside"])
@pytest.mark.parametrize("global_grid, local_grid", GRIDS)
def test_both_views_read_the_same_coordinates(global_grid, local_grid, rule):
    """In all bins, the border ones too, with and without flips: the regions are inset by half a patch of
    either view."""
    views = views_of(
        40,
        CropSettings(
            n_global=2, n_local=4, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_rule=rule
        ),
    )
    regions, are = overlaps(views, global_grid, local_grid, 1.0)
    seen = []
    for which, grid, of_view in (
        (slice(0, 2), global_grid, regions),
        (slice(2, None), local_grid, regions.transpose(1, 2)),
    ):
        boxes, flips = view_major(views.boxes[:, which]), view_major(views.flips[:, which])
        maps = coordinates(boxes, flips, grid)
        read = (
            read_regions(maps, grid, boxes, flips, view_major(of_view), 7, 2)
            .unflatten(0, (-1, 40))
            .transpose(0, 1)
        )
        seen.append(read if len(seen) == 0 else read.transpose(1, 2))  # [B, G, L, 49, 3]
    assert are.float().mean() > 0.3 and views.flips.float().mean() > 0.3
    torch.testing.assert_close(seen[0][are], seen[1][are], atol=1e-12, rtol=0)
    steps = (
        torch.arange(7, dtype=torch.float64) + 0.5
    ) / 7  # the bins' centers, rows and columns those of the image
    x0, y0, x1, y1 = regions[are].unsqueeze(1).unbind(-1)
    expected = (
        (x0 + steps * (x1 - x0))[:, None, :].expand(-1, 7, -1),
        (y0 + steps * (y1 - y0))[:, :, None].expand(-1, -1, 7),
    )
    torch.testing.assert_close(
        seen[0][are][..., :2], torch.stack(expected, -1).flatten(1, 2), atol=1e-12, rtol=0
    )


def test_without_the_inset_border_bins_would_differ():
    """What the half patch is for: read up to its edge, a view repeats its border."""
    box, flips = torch.tensor([[0.2, 0.2, 0.6, 0.6]], dtype=torch.float64), torch.tensor([False])
    maps = coordinates(box, flips, (6, 6))
    whole, inner = (
        read_regions(maps, (6, 6), box, flips, r[:, None], 7, 2)[0, 0] for r in (box, inset(box, (6, 6)))
    )
    steps = (torch.arange(7, dtype=torch.float64) + 0.5) / 7
    assert (whole.unflatten(0, (7, 7))[0, :, 0] - (0.2 + 0.4 * steps)).abs().max() > 0.005
    low, high = 0.2 + 0.2 / 6, 0.6 - 0.2 / 6
    torch.testing.assert_close(inner.unflatten(0, (7, 7))[0, :, 0], low + steps * (high - low))


@pytest.mark.parametrize("flip", [False, True])
def test_a_bin_a_patch_reads_the_patches(flip):
    """A box read in all of it, with a bin a patch and one point a bin; of a flipped view in the image's
    order."""
    maps, box = (
        torch.randn(1, 15, 4, dtype=torch.float64),
        torch.tensor([[0.25, 0.0, 0.75, 1.0]], dtype=torch.float64),
    )
    square = maps.unflatten(1, (3, 5))[:, :, :3].flatten(1, 2)
    read = read_regions(square, (3, 3), box, torch.tensor([flip]), box[:, None], 3, 1)[0]
    torch.testing.assert_close(read, square.unflatten(1, (3, 3)).flip(2).flatten(1, 2) if flip else square)


def test_what_is_an_overlap():
    whole = (0.0, 0.0, 1.0, 1.0)
    cases = [
        ((0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 1.0, 1.0), False),  # apart
        ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), False),  # side by side
        (
            (0.0, 0.0, 0.5, 1.0),
            (0.45, 0.0, 0.95, 1.0),
            False,
        ),  # by one patch: nothing between the outermost centers
        ((0.0, 0.0, 0.5, 1.0), (0.2, 0.0, 0.7, 1.0), True),
        (whole, whole, True),
        (whole, (0.2, 0.2, 0.5, 0.5), True),
        (whole, (0.2, 0.2, 0.5, 0.25), False),  # narrower than two of the global crop's patches
    ]
    for global_box, local_box, expected in cases:
        views = made_views(global_box, local_box)
        regions, are = overlaps(views, (10, 10), (10, 10), 2.0)
        assert are.tolist() == [[[expected]]], (global_box, local_box)
        x0, y0, x1, y1 = regions[0, 0, 0].tolist()
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1  # to be read in any case
        for index in (0, 1):
            read = read_regions(
                torch.randn(1, 100, 3),
                (10, 10),
                views.boxes[:, index],
                views.flips[:, index],
                regions[:, 0],
                7,
                2,
            )
            assert read.isfinite().all() and read.shape == (1, 1, 49, 3)


@pytest.mark.parametrize(
    "least, n_patches, expected",
    [(2.0, 3, True), (2.01, 3, False), (1.0, 2, True), (0.5, 1, False), (2.0, 1, False)],
)
def test_the_least_overlap_is_robust_to_rounding(least, n_patches, expected):
    """A local crop of n patches inside its global one overlaps it by n - 1 of its patches, wherever the
    two lie, in float32."""
    rng = np.random.default_rng(0)
    corner = rng.random((2000, 2)) * 0.7
    side = 0.05 + 0.2 * rng.random((2000, 1))
    local = np.concatenate([corner, corner + side], 1)
    boxes = torch.from_numpy(np.stack([np.tile([0.0, 0.0, 1.0, 1.0], (2000, 1)), local], 1)).float()
    boxes[:, 0] = torch.stack(
        [boxes[:, 1, 0] - 0.1, boxes[:, 1, 1] - 0.1, boxes[:, 1, 2] + 0.1, boxes[:, 1, 3] + 0.1], -1
    )
    views = Views(boxes, torch.zeros(2000, 2, dtype=torch.bool), boxes, 1)
    _, are = overlaps(views, (60, 60), (n_patches, n_patches), least)
    assert are.all() if expected else not are.any()


def test_regions_of_drawn_crops_lie_between_the_outermost_centers():
    """So no point is moved to the border, in float32 too."""
    crops = CropSettings(
        n_global=2, n_local=6, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_rule="inside"
    )
    views = views_of(60, crops).map(lambda x: x.float() if x.is_floating_point() else x)
    regions, are = overlaps(views, (14, 14), (6, 6), 2.0)
    assert are.float().mean() > 0.5
    for boxes, grid, axis in ((views.boxes[:, :2], (14, 14), 2), (views.boxes[:, 2:], (6, 6), 1)):
        inner = inset(boxes, grid).unsqueeze(axis).expand_as(regions)[are]
        assert (regions[are][:, :2] >= inner[:, :2]).all() and (regions[are][:, 2:] <= inner[:, 2:]).all()
    own = torch.arange(6) % 2 == torch.arange(2)[:, None]
    assert are[:, own].float().mean() > 0.9  # with its parent, nearly every local crop overlaps


def test_reading_is_deterministic_and_of_the_maps_type():
    boxes, flips = torch.tensor([[0.1, 0.1, 0.9, 0.9]] * 2), torch.tensor([False, True])
    regions = torch.tensor([[[0.2, 0.2, 0.7, 0.8], [0.3, 0.2, 0.5, 0.4]]] * 2)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        exact = torch.randn(2, 36, 4, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda x: read_regions(x, (6, 6), boxes.double(), flips, regions.double(), 3, 2),
            exact.requires_grad_(),
        )
    finally:
        torch.use_deterministic_algorithms(was)
    maps = torch.randn(2, 36, 4).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        read = read_regions(maps, (6, 6), boxes, flips, regions, 3, 2)
    expected = read_regions(maps.float(), (6, 6), boxes, flips, regions, 3, 2)
    assert read.dtype == torch.bfloat16 and torch.equal(read, expected.bfloat16())  # rounded once, at the end
    read.sum().backward()
    assert maps.grad.isfinite().all() and maps.grad.any()
