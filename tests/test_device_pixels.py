"""The device path: crops as matrix products, colors a sample, and the same pixels as the CPU path."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pixels import picture
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as on_tensors

from pretrain.data.loader import lay_out
from pretrain.views import device_pixels
from pretrain.views.boxes import CropSettings, PositionSettings, draw_views
from pretrain.views.color import NO_COLOR, OPERATIONS, Colors, ColorSettings, draw_colors
from pretrain.views.device_pixels import CanvasBatch, apply_colors
from pretrain.views.masks import MaskSettings, draw_masks
from pretrain.views.pixels import STD, normalize, render
from pretrain.views.resample import blur_weights, resize_weights, sandwich

CPU = torch.device("cpu")
SIZES = [(90, 120), (75, 61), (40, 128), (31, 33)]


def photograph(height, width, seed):
    """Smooth colors with a little grain. (In pure noise the bytes between the CPU path's two passes clip
    what overshoots.)"""
    smooth = cv2.GaussianBlur(picture(height, width, seed), (9, 9), 2.0).astype(np.float64)
    return (
        (smooth + np.random.default_rng(seed).normal(0, 5, smooth.shape))
        .clip(0, 255)
        .round()
        .astype(np.uint8)
    )


def canvas_batch(n_images=4, rule=None, n_local=3, global_px=64, local_px=32):
    """A batch of images of several sizes as a worker hands it over, and its images."""
    rule = rule or ColorSettings()
    images = [photograph(*SIZES[i % len(SIZES)], i) for i in range(n_images)]
    canvas, sizes = lay_out(images)
    crops = CropSettings(n_local=n_local)
    views = draw_views(
        sizes, crops, PositionSettings(), [np.random.default_rng([1, i]) for i in range(n_images)]
    )
    colors = draw_colors(2 + n_local, 2, rule, [np.random.default_rng([2, i]) for i in range(n_images)])
    masks = draw_masks(n_images, 2, (4, 4), MaskSettings(), (0,))
    return CanvasBatch(
        canvas, torch.from_numpy(sizes).float(), views, colors, masks, rule, global_px, local_px
    ), images


def on_the_cpu_path(batch, images):
    """The same draws through the workers' code: normalized crops, view-major."""
    groups = []
    for i, image in enumerate(images):
        views, colors = (record.map(lambda t, i=i: t[i : i + 1]) for record in (batch.views, batch.colors))
        groups.append(
            render(image, views, colors, batch.rule, global_px=batch.global_px, local_px=batch.local_px)
        )
    return [normalize(torch.stack(crops, dim=1).flatten(0, 1)) for crops in zip(*groups)]


def levels_apart(a, b):
    """Differences of normalized crops in levels of 255, flat and rising."""
    return ((a - b).abs() * torch.tensor(STD).view(3, 1, 1) * 255).flatten().sort().values


@pytest.mark.parametrize("size", [16, 32, 96])
def test_crop_resize_by_matrices_equals_interpolation_of_the_crop(size):
    """1.4e-5 on values in [0, 1], growing and shrinking, flipped or not, down to a single pixel."""
    image = torch.rand(3, 90, 130, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(
        [[3, 5, 120, 80], [10, 10, 30, 25], [0, 0, 130, 90], [50, 50, 51, 52], [129, 0, 130, 90]]
    )
    left, top, right, bottom = boxes.float()[None].unbind(-1)
    for flip in (False, True):
        flips = torch.full((1, len(boxes)), flip)
        rows, columns = (
            resize_weights(top, bottom - top, 90, size),
            resize_weights(left, right - left, 130, size, flips),
        )
        ours = sandwich(rows, image.permute(1, 0, 2)[None], columns)[0].transpose(1, 2)  # [V, 3, size, size]
        for (x0, y0, x1, y1), crop in zip(boxes.tolist(), ours):
            expected = F.interpolate(
                image[None, :, y0:y1, x0:x1], (size, size), mode="bicubic", antialias=True
            )[0]
            torch.testing.assert_close(crop, expected.flip(-1) if flip else expected, atol=1.4e-5, rtol=0)


def test_blur_by_matrices_equals_torchvisions():
    image = torch.rand(4, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([[0.1, 0.7, 2.0, 0.0]], dtype=torch.float64)
    weights = blur_weights(sigma, 9, 20)
    blurred = sandwich(weights, image.transpose(1, 2)[None], weights)[0].transpose(1, 2)
    for i in range(3):
        expected = on_tensors.gaussian_blur(image[i], [9, 9], [sigma[0, i].item()] * 2)
        torch.testing.assert_close(blurred[i], expected, atol=1e-6, rtol=0)
    assert torch.equal(blurred[3], image[3])  # no blur is the identity, bit for bit


def test_every_order_of_the_jitter_equals_torchvisions():
    """All 24 orders in one batch, and a sample without jitter beside each; then gray and solarize by
    sample."""
    orders = torch.tensor([[0, 1, 2, 3]])[:, torch.cartesian_prod(*[torch.arange(4)] * 4)][0]
    orders = orders[[len(set(order.tolist())) == 4 for order in orders]]
    n = len(orders)
    image = torch.from_numpy(picture(24, 24)).permute(2, 0, 1).float()
    factors = torch.tensor([1.3, 0.7, 1.15, -0.08]).expand(n, 2, -1)
    on = torch.tensor([True, False]).expand(n, 2)
    colors = Colors(on, orders[:, None].expand(-1, 2, -1), factors, ~on, torch.zeros(n, 2), ~on)
    start = image.transpose(0, 1).expand(n, 2, -1, -1, -1)
    ours = apply_colors(start, colors, ColorSettings(solarize_threshold=100)).transpose(
        2, 3
    )  # [24, 2, 3, y, x]
    gray = on_tensors.rgb_to_grayscale(image, 3)
    for order, (jittered, plain) in zip(orders.tolist(), ours):
        expected = image.double() / 255
        for i in order:
            expected = getattr(on_tensors, f"adjust_{OPERATIONS[i]}")(expected, factors[0, 0, i].item())
        torch.testing.assert_close(
            jittered.double(), expected * 255, atol=0.02, rtol=0
        )  # torchvision's luma: 0.2989, 0.587, 0.114
        inverted = torch.where(gray.round() >= 100, 255 - gray, gray)
        torch.testing.assert_close(plain, inverted, atol=0.03, rtol=0)


@pytest.mark.parametrize("working", [torch.float32, torch.float16])
def test_both_paths_make_the_same_pixels(working, monkeypatch):
    """Same images and draws: the mean difference is below half a level, 99.9% lie within 4 and all within 8.

    The workers round after each operation, and a later one may amplify that. float16 is what CUDA works in.
    """
    monkeypatch.setattr(device_pixels, "working_dtype", lambda device: working)
    batch, images = canvas_batch(8)
    made = batch.to(CPU)
    assert made.global_crops.shape == (16, 3, 64, 64) and made.local_crops.shape == (24, 3, 32, 32)
    assert made.global_crops.dtype == made.local_crops.dtype == torch.float32
    for ours, theirs in zip((made.global_crops, made.local_crops), on_the_cpu_path(batch, images)):
        apart = levels_apart(ours, theirs)
        assert apart.mean() < 0.5 and apart[int(0.999 * len(apart))] < 4 and apart[-1] < 8


def test_without_color_both_paths_agree_to_one_level():
    plain = ColorSettings(**NO_COLOR)
    batch, images = canvas_batch(4, plain)
    made = batch.to(CPU)
    for ours, theirs in zip((made.global_crops, made.local_crops), on_the_cpu_path(batch, images)):
        assert levels_apart(ours, theirs)[-1] < 1.01


def test_what_lies_beside_an_image_on_the_canvas_is_never_seen():
    batch, _ = canvas_batch(4)
    other = batch.map(torch.clone)
    for canvas, (height, width) in zip(other.canvas, other.sizes.int().tolist()):
        canvas[height:], canvas[:, width:] = 77, 201
    assert not torch.equal(other.canvas, batch.canvas)
    for name in ("global_crops", "local_crops"):
        assert torch.equal(getattr(other.to(CPU), name), getattr(batch.to(CPU), name))


class Count(TorchDispatchMode):
    """Operations, and those that make the host wait."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "index", "equal"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_the_work_does_not_depend_on_the_number_of_images_and_never_waits():
    counts = []
    for n_images in (2, 8):
        batch, _ = canvas_batch(n_images)
        batch.to(CPU)  # fills the caches
        with Count() as count:
            batch.to(CPU)
        assert count.waits == []
        counts.append(count.operations)
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_pixels_without_the_host_waiting():
    batch, images = canvas_batch(8)
    pinned = batch.pin_memory()
    pinned.to(torch.device("cuda"), torch.bfloat16)  # fills the caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = pinned.to(torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip((made.global_crops, made.local_crops), on_the_cpu_path(batch, images)):
        apart = levels_apart(ours.cpu(), theirs)
        assert apart.mean() < 0.5 and apart[int(0.999 * len(apart))] < 4 and apart[-1] < 8


def test_the_batch_goes_with_its_views_masks_and_dtype():
    batch, _ = canvas_batch(3, n_local=0)
    with torch.autocast("cpu", torch.bfloat16):  # of the step: the crops are not for it
        made = batch.to(CPU, torch.float64)
    plain = batch.to(CPU)
    assert made.local_crops.shape == (0, 3, 32, 32) and made.n_images == batch.n_images == 3
    assert torch.equal(made.views.position_boxes, batch.views.position_boxes)
    assert torch.equal(made.masks.content_index, batch.masks.content_index)
    assert made.global_crops.dtype == torch.float64 and torch.equal(
        made.global_crops, plain.global_crops.double()
    )
