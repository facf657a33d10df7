"""The CPU path's pixels: each operation against torchvision's on the same parameters, and bytes on their
way to a step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as on_pil
from torchvision.transforms.v2 import functional as on_tensors

from pretrain.views.batch import Batch
from pretrain.views.boxes import CropSettings, PositionSettings, draw_views
from pretrain.views.color import OPERATIONS, ColorSettings, draw_colors
from pretrain.views.masks import MaskSettings, draw_masks
from pretrain.views.pixels import (
    ADJUST,
    MEAN,
    STD,
    apply_color,
    blur,
    crop_resize,
    normalize,
    render,
    solarize,
    to_gray,
)


def picture(height=90, width=120, seed=0):
    """Smooth colors and noise side by side, [H, W, 3] uint8: every hue, gray, black and white."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    image = np.array(coarse)
    image[: height // 3] = rng.integers(0, 256, (height // 3, width, 3), dtype=np.uint8)
    image[-10:, :10], image[-10:, 10:20], image[-10:, 20:30] = 0, 255, 128
    return image


def planes(image):
    """[H, W, 3] -> tensor [3, H, W]."""
    return torch.from_numpy(image).permute(2, 0, 1)


def levels_apart(ours, theirs):
    """The largest difference of two images [H, W, 3], in levels of 255."""
    theirs = theirs.permute(1, 2, 0).numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    return np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()


@pytest.mark.parametrize(
    "box", [(0, 0, 120, 90), (11, 7, 101, 83), (40, 30, 52, 41), (5, 5, 115, 9), (50, 0, 51, 1)]
)
@pytest.mark.parametrize("size", [32, 64])
def test_crop_and_resize_is_torchvisions(box, size):
    image = picture()
    left, top, right, bottom = box
    cubic = on_tensors.InterpolationMode.BICUBIC
    for flip in (False, True):
        ours = crop_resize(image, box, flip, size)
        assert ours.dtype == np.uint8 and ours.shape == (size, size, 3) and ours.flags.c_contiguous
        expected = on_tensors.resized_crop(
            planes(image), top, left, bottom - top, right - left, [size, size], cubic, True
        )
        assert levels_apart(ours, expected.flip(-1) if flip else expected) <= 1
        pil = on_pil.resized_crop(
            Image.fromarray(image), top, left, bottom - top, right - left, [size, size], cubic
        )
        assert levels_apart(ours, on_pil.hflip(pil) if flip else pil) <= 1


def test_resized_bytes_are_near_the_exact_sum():
    """Within 1.1 levels of float64: weights and the bytes between the axes are rounded. (These clip noise
    that overshoots.)"""
    image = blur(blur(picture(), 2.0, 9), 2.0, 9)
    for size in (32, 64, 160):
        exact = F.interpolate(planes(image).double()[None], (size, size), mode="bicubic", antialias=True)[
            0
        ].clamp(0, 255)
        assert levels_apart(crop_resize(image, (0, 0, 120, 90), False, size), exact) <= 1.1


@pytest.mark.parametrize("operation", range(4), ids=OPERATIONS)
def test_jitter_is_torchvisions(operation):
    """Exact to rounding (of the gray image, too) against torchvision's floats; one level against its bytes,
    and PIL's.

    PIL's hue is coarser, for its HSV has eight bits a channel: the smooth part of the image is then within 16
    levels.
    """
    image, name = picture(), f"adjust_{OPERATIONS[operation]}"
    for factor in (
        (-0.5, -0.1, -0.03, 0, 0.04, 0.1, 0.5)
        if OPERATIONS[operation] == "hue"
        else (0, 0.6, 0.83, 1, 1.2, 1.4)
    ):
        ours = ADJUST[operation](image, factor)
        assert ours.dtype == np.uint8 and ours.shape == image.shape
        exact = getattr(on_tensors, name)(planes(image).double() / 255, factor) * 255
        assert levels_apart(ours, exact) <= 0.75, factor
        assert levels_apart(ours, getattr(on_tensors, name)(planes(image), factor)) <= 1, factor
        pil = np.asarray(getattr(on_pil, name)(Image.fromarray(image), factor))
        if OPERATIONS[operation] == "hue":
            assert levels_apart(ours[30:], pil[30:]) <= 16, factor
        else:
            assert levels_apart(ours, pil) <= 1, factor


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 2.0])
def test_blur_is_torchvisions(sigma):
    image = picture()
    exact = on_tensors.gaussian_blur(planes(image).double(), [9, 9], [sigma, sigma])
    assert levels_apart(blur(image, sigma, 9), exact) <= 0.51
    assert (
        levels_apart(blur(image, sigma, 9), on_tensors.gaussian_blur(planes(image), [9, 9], [sigma, sigma]))
        <= 1
    )


def test_gray_and_solarize_are_torchvisions():
    image = picture()
    assert levels_apart(to_gray(image), on_tensors.rgb_to_grayscale(planes(image), 3)) <= 1
    assert levels_apart(to_gray(image), on_pil.to_grayscale(Image.fromarray(image), 3)) <= 1
    for threshold in (0, 100, 128, 255):
        assert levels_apart(solarize(image, threshold), on_tensors.solarize(planes(image), threshold)) == 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_whole_color_is_torchvisions(order):
    """Jitter in the drawn order, then gray, blur, solarize; each rounding is amplified by what follows."""
    image, factors = picture(), [1.3, 0.7, 1.15, -0.08]
    expected = planes(image).double() / 255
    for i in order:
        expected = getattr(on_tensors, f"adjust_{OPERATIONS[i]}")(expected, factors[i])
    for gray, sigma, solarized in [(False, 0.0, False), (True, 0.0, True), (False, 1.3, True)]:
        end = on_tensors.rgb_to_grayscale(expected, 3) if gray else expected
        end = on_tensors.gaussian_blur(end, [9, 9], [sigma, sigma]) if sigma else end
        end = torch.where(end * 255 >= 127.5, 1 - end, end) if solarized else end
        ours = apply_color(image, (True, list(order), factors, gray, sigma, solarized), ColorSettings())
        assert levels_apart(ours, end * 255) <= 3.5
    assert apply_color(image, (False, list(order), factors, False, 0.0, False), ColorSettings()) is image


def test_rendering_is_crop_then_color():
    image, rule = picture(), ColorSettings()
    views = draw_views(
        np.array([[90, 120]]), CropSettings(n_local=3), PositionSettings(), [np.random.default_rng(1)]
    )
    colors = draw_colors(5, 2, rule, [np.random.default_rng(2)])
    global_crops, local_crops = render(image, views, colors, rule, global_px=48, local_px=32)
    assert (
        global_crops.shape == (2, 3, 48, 48)
        and local_crops.shape == (3, 3, 32, 32)
        and local_crops.dtype == torch.uint8
    )
    for view, (crop, color) in enumerate(zip([*global_crops, *local_crops], colors.rows(0))):
        box = [
            round(side * length) for side, length in zip(views.boxes[0, view].tolist(), (120, 90, 120, 90))
        ]
        expected = apply_color(
            crop_resize(image, tuple(box), bool(views.flips[0, view]), crop.shape[1]), color, rule
        )
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)
    none = draw_views(
        np.array([[90, 120]]), CropSettings(n_local=0), PositionSettings(), [np.random.default_rng(1)]
    )
    assert render(image, none, colors, rule, global_px=48, local_px=32)[1].shape == (0, 3, 32, 32)


def test_bytes_are_normalized_on_the_way_to_the_step():
    """A batch of bytes becomes exactly what normalizing its crops beforehand would give, in any memory
    layout."""
    generator = torch.Generator().manual_seed(0)
    channels_last = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(
        0, 3, 1, 2
    )
    planar = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    views = draw_views(
        np.array([[90, 120]] * 2),
        CropSettings(n_local=1),
        PositionSettings(),
        [np.random.default_rng(i) for i in (0, 1)],
    )
    batch = Batch(channels_last, planar, views, draw_masks(2, 2, (2, 2), MaskSettings(), (0,)))
    mean, std = torch.tensor(MEAN).view(3, 1, 1) * 255, torch.tensor(STD).view(3, 1, 1) * 255
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        moved = batch.to(torch.device("cpu"), dtype)
        for bytes_, crops in ((channels_last, moved.global_crops), (planar, moved.local_crops)):
            assert crops.dtype == dtype and crops.is_contiguous()
            assert torch.equal(crops, ((bytes_.float() - mean) / std).to(dtype))
        again = moved.to(torch.device("cpu"), dtype)
        assert torch.equal(again.global_crops, moved.global_crops) and again.n_images == 2
    white = normalize(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(white, (1 - torch.tensor(MEAN)) / torch.tensor(STD))
