"""One geometry for pixels and positions: boxes, flips and position boxes against their definitions."""

import math

import numpy as np
import pytest
import torch
import torchvision

from pretrain.backbones.position import axis_weights, full_image_box, patch_centres, sample_field
from pretrain.backbones.vit import ViT
from pretrain.views.boxes import CropRule, PositionRule, Views, augment_positions, draw_crop, draw_s, draw_views, pixel_box
from pretrain.views.colour import ColourRule, draw_colour
from pretrain.views.pixels import MEAN, STD, apply_colour, crop_resize, normalise, render


def linear_field(n, weights=((3.0, -1.0), (0.5, 2.0))):
    """A field [1, 2, n, n] whose channel c is a_c x + b_c y at the image point (x, y)."""
    axis = torch.linspace(0, 1, n, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([a * x + b * y for a, b in weights])[None]


@pytest.mark.parametrize("pos_encoding", ["field", "standard"])
def test_full_image_box_is_the_inference_grid(pos_encoding):
    model = ViT(embed_dim=12, depth=1, num_heads=2, pos_encoding=pos_encoding)
    for grid in [(14, 14), (6, 6), (5, 9), (64, 64)]:
        box = full_image_box().expand(2, -1)
        sampled = model.positions(grid, box, torch.zeros(2, dtype=torch.bool))
        torch.testing.assert_close(sampled, model.positions(grid).expand(len(sampled), -1, -1), atol=1e-7, rtol=0)


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
    """Halfway between two samples, a = -0.5 weighs the four neighbours -1/16, 9/16, 9/16, -1/16."""
    weights = axis_weights(torch.tensor([0.45], dtype=torch.float64), 11)  # sample 4.5
    expected = torch.zeros(1, 11, dtype=torch.float64)
    expected[0, 3:7] = torch.tensor([-1, 9, 9, -1], dtype=torch.float64) / 16
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("flip", [False, True])
def test_positions_follow_the_pixels(flip):
    """For a linear P the sampled positions are the patch means of the same crop of an image that stores its coordinates."""
    height, width, patch, n = 96, 128, 8, 4
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) + 0.5) / height,
        (torch.arange(width, dtype=torch.float64) + 0.5) / width,
        indexing="ij",
    )
    image = torch.stack([3 * x - y, 0.5 * x + 2 * y])  # [2, H, W], the same linear functions as the field's
    left, top, right, bottom = box = (20, 12, 20 + 2 * n * patch, 12 + 2 * n * patch)  # twice the crop's size, inside
    crop = crop_resize(image, box, flip, n * patch)
    means = torch.nn.functional.avg_pool2d(crop[None], patch).flatten(2).transpose(1, 2)  # [1, n * n, 2]
    units = torch.tensor([[left / width, top / height, right / width, bottom / height]], dtype=torch.float64)
    sampled = sample_field(linear_field(50), units, (n, n), torch.tensor([flip]))
    # the resize's antialiasing replicates the crop's border, so its outermost patches are off by a fraction of a pixel
    inner = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(sampled.unflatten(1, (n, n))[inner], means.unflatten(1, (n, n))[inner], atol=1e-4, rtol=0)


def test_drawn_views_carry_pixels_and_positions_together():
    """Through draw_views and render, with jitter off: a view's pixels hold the coordinates at which P is sampled."""
    height, width, size, patch = 90, 120, 32, 8
    y, x = np.indices((height, width))
    image = torch.from_numpy(np.stack([x * 2, y * 2, x * 0]).astype(np.uint8))
    rule = CropRule(n_global=2, n_local=3, global_scale=(0.5, 0.8), local_scale=(0.3, 0.4))
    views = draw_views(height, width, rule, PositionRule(enabled=False), np.random.default_rng(3))
    off = ColourRule(jitter_p=0, grey_p=0, blur_p=(0, 0, 0), solarize_p=(0, 0, 0))
    colours = [draw_colour(v, 2, off, np.random.default_rng(0)) for v in range(5)]
    assert set(views.flips[0].tolist()) == {True, False}
    crops = render(image, views, colours, global_px=size, local_px=size, blur_kernel_px=9, solarize_threshold=128)
    pixels = torch.cat(crops) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)  # [5, 3, s, s] in [0, 1]
    n = size // patch
    seen = torch.nn.functional.avg_pool2d(pixels * 255 / 2, patch)[:, :2]  # [5, 2 (x, y), n, n], pixels of the image
    x_at = patch_centres(views.boxes[0, :, 0], views.boxes[0, :, 2], n, views.flips[0]) * width - 0.5  # [5, n]
    y_at = patch_centres(views.boxes[0, :, 1], views.boxes[0, :, 3], n) * height - 0.5
    inner = slice(1, -1)
    torch.testing.assert_close(seen[:, 0, inner, inner].mean(1), x_at[:, inner], atol=0.5, rtol=0)
    torch.testing.assert_close(seen[:, 1, inner, inner].mean(2), y_at[:, inner], atol=0.5, rtol=0)


def test_crops_are_distributed_as_torchvisions():
    """Area and aspect of 4,000 draws have torchvision's quantiles; the fallback is the same box."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image, scale, ratio = torch.zeros(1, 300, 500), (0.05, 0.32), (3 / 4, 4 / 3)
    ours = np.array([draw_crop(300, 500, scale, ratio, rng) for _ in range(4000)], dtype=float)
    theirs = np.array([torchvision.transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)], dtype=float)
    w, h = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    for a, b in [(w * h, theirs[:, 3] * theirs[:, 2]), (w / h, theirs[:, 3] / theirs[:, 2]), (ours[:, 0], theirs[:, 1])]:
        spread = b.std()
        for q in (0.1, 0.5, 0.9):
            assert abs(np.quantile(a, q) - np.quantile(b, q)) < 0.1 * spread
    assert (ours[:, :2] >= 0).all() and (ours[:, 2] <= 500).all() and (ours[:, 3] <= 300).all()
    narrow = torch.zeros(1, 20, 400)
    i, j, h, w = torchvision.transforms.RandomResizedCrop.get_params(narrow, (0.9, 1.0), ratio)
    assert draw_crop(20, 400, (0.9, 1.0), ratio, rng) == (j, i, j + w, i + h)


def test_boxes_are_whole_pixels():
    views = draw_views(333, 517, CropRule(), PositionRule(), np.random.default_rng(1))
    for box in views.boxes[0]:
        left, top, right, bottom = pixel_box(box, 333, 517)
        exact = torch.tensor([left / 517, top / 333, right / 517, bottom / 333])
        assert 0 <= left < right <= 517 and 0 <= top < bottom <= 333
        torch.testing.assert_close(box, exact, atol=1e-7, rtol=0)


BOXES = np.array([[0.1, 0.2, 0.6, 0.9], [0.3, 0.1, 0.8, 0.7], [0.2, 0.3, 0.4, 0.5]])


@pytest.mark.parametrize("s", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("reference", ["crops", "image"])
def test_position_augmentation_is_one_affine_map(s, reference):
    rule = PositionRule(scale="constant", s_min=0.1, s_max=s, reference=reference)
    places = []
    for seed in range(50):
        moved = augment_positions(BOXES, rule, 2, np.random.default_rng(seed))
        factors = (moved[:, 2:] - moved[:, :2]) / (BOXES[:, 2:] - BOXES[:, :2])
        np.testing.assert_allclose(factors, factors[0, 0])  # one scale for all boxes and both axes
        np.testing.assert_allclose(
            moved[:, :2] - factors[0, 0] * BOXES[:, :2], np.tile(moved[0, :2] - factors[0, 0] * BOXES[0, :2], (3, 1))
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
    beta = np.array([draw_s(PositionRule(), rng) for _ in range(20000)])
    assert abs(beta.mean() - (0.2 + 0.8 * 2 / 7)) < 0.005 and beta.min() >= 0.2 and beta.max() <= 1
    uniform = np.array([draw_s(PositionRule(scale="uniform"), rng) for _ in range(20000)])
    assert abs(uniform.mean() - 0.6) < 0.005 and abs(uniform.std() - 0.8 / math.sqrt(12)) < 0.005
    assert draw_s(PositionRule(scale="constant"), rng) == 1.0


def test_surround_globals_alone():
    rule = PositionRule(scale="constant", s_max=0.3, surround="globals")
    boxes = np.array([[0.3, 0.3, 0.6, 0.6], [0.4, 0.4, 0.7, 0.7], [0.0, 0.0, 0.1, 0.1]])
    moved = augment_positions(boxes, rule, 2, np.random.default_rng(0))
    size = moved[:2, 2:].max(0) - moved[:2, :2].min(0)
    np.testing.assert_allclose(size.prod(), 0.3)


def test_views_are_view_major():
    one = draw_views(100, 100, CropRule(n_local=1), PositionRule(), np.random.default_rng(0))
    two = draw_views(100, 100, CropRule(n_local=1), PositionRule(), np.random.default_rng(1))
    batch = Views.stack([one, two])
    boxes, flips = batch.globals
    torch.testing.assert_close(boxes, torch.stack([v.position_boxes[0, i] for i in (0, 1) for v in (one, two)]))
    assert flips.tolist() == [bool(v.flips[0, i]) for i in (0, 1) for v in (one, two)]
    assert batch.locals[0].shape == (2, 4)


def test_colour_equals_torchvision_on_the_same_parameters():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    F = torchvision.transforms.v2.functional
    colour = draw_colour(1, 2, ColourRule(jitter_p=1, grey_p=1, blur_p=(1, 1, 1), solarize_p=(1, 1, 1)), np.random.default_rng(0))
    expected = image
    for i in colour.order:
        name = ("brightness", "contrast", "saturation", "hue")[i]
        expected = getattr(F, f"adjust_{name}")(expected, getattr(colour, name))
    expected = F.solarize(F.gaussian_blur(F.rgb_to_grayscale(expected, 3), [9, 9], [colour.blur_sigma] * 2), 128)
    assert torch.equal(apply_colour(image, colour, 9, 128), expected)
    assert sorted(colour.order) == [0, 1, 2, 3]


def test_colour_probabilities_by_view():
    rng = np.random.default_rng(0)
    for view, blur, solarize in [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0), (9, 0.5, 0.0)]:
        drawn = [draw_colour(view, 2, ColourRule(), rng) for _ in range(4000)]
        rates = [np.mean(v) for v in zip(*[(c.order is not None, c.grey, c.blur_sigma is not None, c.solarize) for c in drawn])]
        np.testing.assert_allclose(rates, [0.8, 0.2, blur, solarize], atol=0.025)
    assert all(abs(c.hue) <= 0.1 and 0.6 <= c.brightness <= 1.4 and 0.8 <= c.saturation <= 1.2 for c in drawn)


def test_normalise_is_imagenets():
    white = normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(white, (1 - torch.tensor(MEAN)) / torch.tensor(STD))
