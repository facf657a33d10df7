"""One geometry for pixels and positions: boxes, flips and position boxes against their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision

from pretrain.backbones.position import axis_weights, patch_centers, sample_field
from pretrain.backbones.rotary import frequencies, rotation
from pretrain.backbones.vit import ViT
from pretrain.views.boxes import (
    TRIES,
    CropSettings,
    PositionSettings,
    augment_positions,
    central_crop,
    draw_crops,
    draw_move,
    draw_s,
    draw_views,
    pixel_boxes,
)
from pretrain.views.color import NO_COLOR, ColorSettings, draw_colors
from pretrain.views.pixels import render
from pretrain.views.resample import resize_weights, sandwich


def linear_field(n, weights=((3.0, -1.0), (0.5, 2.0))):
    """A field [1, 2, n, n] whose channel c is a_c x + b_c y at the image point (x, y)."""
    axis = torch.linspace(0, 1, n, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([a * x + b * y for a, b in weights])[None]


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (5, 9), (24, 24)])
def test_the_inference_grid_of_a_field_is_the_patch_centers(grid):
    """A field that stores a linear function of the image gives it back at (j + 1/2) / w, (i + 1/2) / h."""
    model = ViT(embed_dim=2, depth=1, num_heads=1, pos_encoding="field").double()
    with torch.no_grad():
        model.pos_field.copy_(linear_field(model.pos_field.shape[-1]))
    y, x = torch.meshgrid(*((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid), indexing="ij")
    expected = torch.stack([3 * x - y, 0.5 * x + 2 * y], -1).flatten(0, 1)[None]
    torch.testing.assert_close(model.positions(grid), expected)


def test_a_standard_encoding_is_its_learned_grid_in_every_crop():
    model = ViT(embed_dim=12, depth=1, num_heads=2, pos_encoding="standard")
    grid = (model.pos_grid, model.pos_grid)
    crops = model.positions(
        grid, torch.tensor([[0.0, 0.2, 0.3, 0.4], [0.5, 0.5, 1.0, 1.0]]), torch.tensor([True, False])
    )
    for positions in (model.positions(grid), *crops):
        assert torch.equal(positions.reshape(-1, 12), model.pos_embed[0, 1:])


def test_a_flipped_view_has_the_mirrored_grid():
    field = torch.randn(1, 5, 20, 20, dtype=torch.float64)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9]], dtype=torch.float64).expand(2, -1)
    plain, flipped = sample_field(field, boxes, (4, 6), torch.tensor([False, True])).unflatten(1, (4, 6))
    torch.testing.assert_close(flipped, plain.flip(1))
    assert not torch.allclose(flipped, plain)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_axis_weights_interpolate(interpolation):
    points = torch.rand(3, 7, dtype=torch.float64)
    weights = axis_weights(points, 11, interpolation)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7, dtype=torch.float64))
    samples = torch.linspace(0, 1, 11, dtype=torch.float64)  # at a sample's place, the sample itself
    torch.testing.assert_close(axis_weights(samples, 11, interpolation), torch.eye(11, dtype=torch.float64))
    inside = points * 0.8 + 0.1
    torch.testing.assert_close(axis_weights(inside, 11, interpolation) @ samples, inside)
    outside = axis_weights(torch.tensor([-0.5, 1.5], dtype=torch.float64), 11, interpolation)
    torch.testing.assert_close(outside, torch.eye(11, dtype=torch.float64)[[0, 10]])


def test_bicubic_is_the_keys_kernel_by_hand():
    """Halfway between two samples, a = -0.5 weighs the four neighbors -1/16, 9/16, 9/16, -1/16."""
    weights = axis_weights(torch.tensor([0.45], dtype=torch.float64), 11)  # sample 4.5
    expected = torch.zeros(1, 11, dtype=torch.float64)
    expected[0, 3:7] = torch.tensor([-1, 9, 9, -1], dtype=torch.float64) / 16
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("flip", [False, True])
def test_positions_follow_the_pixels(flip):
    """For a linear P the sampled positions are the patch means of the same crop of an image that stores
    its coordinates."""
    height, width, patch, n = 96, 128, 8, 4
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) + 0.5) / height,
        (torch.arange(width, dtype=torch.float64) + 0.5) / width,
        indexing="ij",
    )
    image = torch.stack(
        [3 * x - y, 0.5 * x + 2 * y, x * 0], 1
    )  # [H, 3, W], the same linear functions as the field's
    left, top, right, bottom = (
        20,
        12,
        20 + 2 * n * patch,
        12 + 2 * n * patch,
    )  # twice the crop's size, inside
    start, size = torch.tensor([[[left]], [[top]]]).double(), torch.tensor([[2.0 * n * patch]]).double()
    columns = resize_weights(start[0], size, width, n * patch, torch.tensor([[flip]]))
    crop = sandwich(resize_weights(start[1], size, height, n * patch), image[None], columns)[0, 0].permute(
        1, 0, 2
    )[:2]
    means = torch.nn.functional.avg_pool2d(crop[None], patch).flatten(2).transpose(1, 2)  # [1, n * n, 2]
    units = torch.tensor([[left / width, top / height, right / width, bottom / height]], dtype=torch.float64)
    sampled = sample_field(linear_field(50), units, (n, n), torch.tensor([flip]))
    # the resize's antialiasing replicates the crop's border, so its outermost patches are off by a fraction
    # of a pixel
    inner = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(
        sampled.unflatten(1, (n, n))[inner], means.unflatten(1, (n, n))[inner], atol=1e-4, rtol=0
    )


def test_drawn_views_carry_pixels_and_positions_together():
    """Through draw_views and render, with jitter off: a view's pixels hold the coordinates at which P is
    sampled, and by which rotary positions turn."""
    height, width, size, patch = 90, 120, 32, 8
    y, x = np.indices((height, width))
    image = np.stack([x * 2, y * 2, x * 0], -1).astype(np.uint8)
    rule = CropSettings(n_global=2, n_local=3, global_scale=(0.5, 0.8), local_scale=(0.3, 0.4))
    views = draw_views(
        np.array([[height, width]]), rule, PositionSettings(augment=False), [np.random.default_rng(3)]
    )
    off = ColorSettings(**NO_COLOR)
    colors = draw_colors(5, 2, off, [np.random.default_rng(0)])
    views = replace(
        views, flips=torch.tensor([[True, False, True, False, False]])
    )  # among the global and the local ones
    pixels = torch.cat(
        render(image, views, colors, off, global_px=size, local_px=size)
    ).float()  # [5, 3, s, s] levels
    n = size // patch
    seen = torch.nn.functional.avg_pool2d(pixels / 2, patch)[
        :, :2
    ]  # [5, 2 (x, y), n, n], pixels of the image
    x_at = (
        patch_centers(views.boxes[0, :, 0], views.boxes[0, :, 2], n, views.flips[0]) * width - 0.5
    )  # [5, n]
    y_at = patch_centers(views.boxes[0, :, 1], views.boxes[0, :, 3], n) * height - 0.5
    inner = slice(1, -1)
    torch.testing.assert_close(seen[:, 0, inner, inner].mean(1), x_at[:, inner], atol=0.5, rtol=0)
    torch.testing.assert_close(seen[:, 1, inner, inner].mean(2), y_at[:, inner], atol=0.5, rtol=0)
    angles = rotation(views.boxes[0], (n, n), 16, views.flips[0])
    # The slowest of four frequencies stays within a turn.
    slowest = torch.atan2(angles.sin, angles.cos)[..., [7, 3]] / frequencies(16)[3]  # [5, N, 2 (x, y)]
    share = (slowest / (2 * math.pi) + 1) / 2
    place = (share * torch.tensor([width, height]) - 0.5).unflatten(1, (n, n)).permute(0, 3, 1, 2)
    expected = torch.stack([x_at[:, None].expand(-1, n, -1), y_at[:, :, None].expand(-1, -1, n)], 1)
    torch.testing.assert_close(place, expected.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[..., inner, inner], place[..., inner, inner], atol=0.5, rtol=0)
    assert place[:, 0].std((1, 2)).min() > 3  # the crops differ in what they show


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0)])
def test_crops_are_distributed_as_torchvisions(scale):
    """Kolmogorov-Smirnov on area, aspect and place of 4,000 draws: equal distributions are 0.044 apart
    once in a thousand times."""
    torch.manual_seed(0)
    n, ratio, image = 4000, (3 / 4, 4 / 3), torch.zeros(1, 300, 500)
    u = np.random.default_rng(0).random((n, 1, 2 * TRIES + 2))
    ours = draw_crops(np.array([[300.0, 500.0]]).repeat(n, 0), np.array([scale]), ratio, u)[:, 0]
    theirs = np.array(
        [torchvision.transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)],
        dtype=float,
    )
    w, h = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    top, left, their_h, their_w = theirs.T
    compared = {
        "area": (w * h, their_w * their_h),
        "aspect": (w / h, their_w / their_h),
        "left": (ours[:, 0], left),
        "top": (ours[:, 1], top),
        "free space on the left": (ours[:, 0] / (501 - w), left / (501 - their_w)),
    }
    for name, (a, b) in compared.items():
        both = np.sort(np.concatenate([a, b]))
        distance = (
            abs(np.searchsorted(np.sort(a), both, "right") - np.searchsorted(np.sort(b), both, "right")).max()
            / n
        )
        assert distance < 0.044, (name, distance)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2] <= 500).all() and (ours[:, 3] <= 300).all()


@pytest.mark.parametrize("height, width", [(20, 400), (400, 20), (1, 1), (1, 50), (7, 8)])
def test_the_fallback_is_torchvisions_box(height, width):
    """Where no try fits, as with an area of more than the image: the central crop."""
    scale, ratio = (1.5, 2.0), (3 / 4, 4 / 3)
    i, j, h, w = torchvision.transforms.RandomResizedCrop.get_params(
        torch.zeros(1, height, width), list(scale), list(ratio)
    )
    h, w = max(h, 1), max(w, 1)  # torchvision's may be empty
    assert central_crop(height, width, ratio)[2:] == (j + w, i + h)
    u = np.random.default_rng(0).random((1, 1, 2 * TRIES + 2))
    assert draw_crops(np.array([[height, width]]), np.array([scale]), ratio, u).tolist() == [
        [[j, i, j + w, i + h]]
    ]


def test_boxes_are_whole_pixels():
    sizes = np.array([[333, 517], [1, 1], [3, 2000], [30_000, 41]])
    rngs = [np.random.default_rng(i) for i in range(4)]
    views = draw_views(sizes, CropSettings(), PositionSettings(), rngs)
    height, width = torch.from_numpy(sizes)[:, :, None].unbind(1)
    left, top, right, bottom = (pixels := pixel_boxes(views.boxes, height, width)).unbind(-1)
    assert (
        (0 <= left) & (left < right) & (right <= width) & (0 <= top) & (top < bottom) & (bottom <= height)
    ).all()
    exact = pixels.double() / torch.cat([width, height, width, height], 1)[:, None]
    assert torch.equal(views.boxes, exact.float())


def test_an_image_draws_the_same_alone_and_in_a_batch():
    sizes = np.array([[333, 517], [90, 70], [375, 500]])

    def drawn(images):
        rngs = (
            [np.random.default_rng([1, i]) for i in images],
            [np.random.default_rng([2, i]) for i in images],
        )
        return draw_views(sizes[images], CropSettings(), PositionSettings(), rngs[0]), draw_colors(
            10, 2, ColorSettings(), rngs[1]
        )

    views, colors = drawn([0, 1, 2])
    for i in range(3):
        one, its_colors = drawn([i])
        for name in ("boxes", "flips", "position_boxes"):
            assert torch.equal(getattr(one, name)[0], getattr(views, name)[i])
        assert its_colors.rows(0) == colors.rows(i)


def test_boxes_and_flips_are_the_same_without_position_augmentation():
    on, off = (
        draw_views(
            np.array([[375, 500]]),
            CropSettings(),
            PositionSettings(augment=augment),
            [np.random.default_rng(0)],
        )
        for augment in (True, False)
    )
    assert torch.equal(on.boxes, off.boxes) and torch.equal(on.flips, off.flips)
    assert torch.equal(off.position_boxes, off.boxes) and not torch.equal(on.position_boxes, on.boxes)


BOXES = np.array([[0.1, 0.2, 0.6, 0.9], [0.3, 0.1, 0.8, 0.7], [0.2, 0.3, 0.4, 0.5]])


@pytest.mark.parametrize("s", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("reference", ["crops", "image"])
def test_position_augmentation_is_one_affine_map(s, reference):
    rule = PositionSettings(scale="constant", s_min=0.1, s_max=s, reference=reference)
    places = []
    for seed in range(50):
        moves = np.array([draw_move(rule, np.random.default_rng([seed, i])) for i in range(2)])
        moved = augment_positions(np.stack([BOXES[::-1], BOXES]), rule, 2, moves)[1]
        factors = (moved[:, 2:] - moved[:, :2]) / (BOXES[:, 2:] - BOXES[:, :2])
        np.testing.assert_allclose(factors, factors[0, 0])  # one scale for all boxes and both axes
        np.testing.assert_allclose(
            moved[:, :2] - factors[0, 0] * BOXES[:, :2],
            np.tile(moved[0, :2] - factors[0, 0] * BOXES[0, :2], (3, 1)),
        )
        assert moved.min() >= -1e-12 and moved.max() <= 1 + 1e-12
        places.append(moved[0, 0])
        if reference == "image":
            np.testing.assert_allclose(factors[0, 0], math.sqrt(s))
        else:  # A is 0.7 x 0.8; its area becomes s unless it would leave the field
            size = moved[:, 2:].max(0) - moved[:, :2].min(0)
            np.testing.assert_allclose(size.prod(), min(s, 0.56 / 0.64), rtol=1e-9)
    if s < 1:
        assert np.std(places) > 0.02


def test_s_has_the_papers_distributions():
    rng = np.random.default_rng(0)
    beta = np.array([draw_s(PositionSettings(), rng) for _ in range(20000)])
    assert abs(beta.mean() - (0.2 + 0.8 * 2 / 7)) < 0.005 and beta.min() >= 0.2 and beta.max() <= 1
    uniform = np.array([draw_s(PositionSettings(scale="uniform"), rng) for _ in range(20000)])
    assert abs(uniform.mean() - 0.6) < 0.005 and abs(uniform.std() - 0.8 / math.sqrt(12)) < 0.005
    assert draw_s(PositionSettings(scale="constant"), rng) == 1.0


def test_surround_globals_alone():
    rule = PositionSettings(scale="constant", s_max=0.3, surround="globals")
    boxes = np.array([[0.3, 0.3, 0.6, 0.6], [0.4, 0.4, 0.7, 0.7], [0.0, 0.0, 0.1, 0.1]])
    moved = augment_positions(boxes[None], rule, 2, np.array([draw_move(rule, np.random.default_rng(0))]))[0]
    size = moved[:2, 2:].max(0) - moved[:2, :2].min(0)
    np.testing.assert_allclose(size.prod(), 0.3)


def test_views_are_view_major():
    batch = draw_views(
        np.array([[100, 100], [80, 60]]),
        CropSettings(n_local=1),
        PositionSettings(),
        [np.random.default_rng(i) for i in (0, 1)],
    )
    boxes, flips = batch.globals
    torch.testing.assert_close(
        boxes, torch.stack([batch.position_boxes[b, i] for i in (0, 1) for b in (0, 1)])
    )
    assert flips.tolist() == [bool(batch.flips[b, i]) for i in (0, 1) for b in (0, 1)]
    assert torch.equal(batch.locals[0], batch.position_boxes[:, 2])


def test_color_probabilities_and_ranges_by_view():
    n = 4000
    colors = draw_colors(10, 2, ColorSettings(), [np.random.default_rng([0, i]) for i in range(n)])
    for view, blur, solarize in [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0), (9, 0.5, 0.0)]:
        model_kwargs = [colors.jitter, colors.gray, colors.sigma > 0, colors.solarize]
        rates = [flag[:, view].double().mean() for flag in model_kwargs]
        np.testing.assert_allclose(rates, [0.8, 0.2, blur, solarize], atol=0.025)
    lows, highs = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    factors = (colors.factors - lows) / (highs - lows)  # uniform in [0, 1]
    assert factors.min() >= 0 and factors.max() <= 1
    assert abs(factors.mean((0, 1)) - 1 / 2).max() < 0.01 and abs(factors.var((0, 1)) - 1 / 12).max() < 0.005
    sigma = (colors.sigma[colors.sigma > 0] - 0.1) / 1.9
    assert sigma.min() >= 0 and sigma.max() <= 1 and abs(sigma.mean() - 1 / 2) < 0.01
    orders, counts = colors.order.flatten(0, 1).unique(dim=0, return_counts=True)
    assert len(orders) == 24 and abs(counts / (10 * n) - 1 / 24).max() < 0.005
    assert (
        not np.corrcoef(torch.cat([colors.factors, colors.order.float()], -1).flatten(0, 1).T)
        .round(1)[:4, 4:]
        .any()
    )
