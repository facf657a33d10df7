"""Make the pixels of views on the CPU, in a worker: crop, resize, flip and color one view after the other.

Images are NumPy arrays [H, W, 3] uint8 RGB. Each operation equals torchvision's with the same parameters
within one level of 255 (tests/test_pixels.py; PIL's hue is coarser). OpenCV and torch's uint8 kernels are
several times faster than PIL. :mod:`pretrain.views.device_pixels` makes the same crops batched on the
training device.
"""

from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pretrain.views.boxes import Views, pixel_boxes
from pretrain.views.color import HUE, Color, Colors, ColorSettings

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as DINOv2
STD = (0.229, 0.224, 0.225)

Pixels = NDArray[np.uint8]


def resize(image: Pixels, size_px: tuple[int, int]) -> Pixels:
    """An image [H, W, 3] at another (height, width), bicubic with antialiasing."""
    # torch's fast uint8 kernel needs this layout and keeps it
    stored = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(stored, size_px, mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def crop_resize(image: Pixels, box: tuple[int, int, int, int], flip: bool, size_px: int) -> Pixels:
    """A crop (left, top, right, bottom), resized to [size, size, 3], flipped where asked."""
    left, top, right, bottom = box
    pixels = resize(image[top:bottom, left:right], (size_px, size_px))
    return cv2.flip(pixels, 1) if flip else pixels  # type: ignore[return-value]


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Blend with black: ``factor * image``."""
    return cv2.convertScaleAbs(image, alpha=factor)  # type: ignore[return-value]


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Blend with the mean of the gray image."""
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean)  # type: ignore[return-value]


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    """Blend with the gray image."""
    return cv2.addWeighted(image, factor, to_gray(image), 1 - factor, 0)  # type: ignore[return-value]


def adjust_hue(image: Pixels, shift: float) -> Pixels:
    """Turn the hue by ``shift`` of a full circle, in HSV and float32: bytes lose several levels."""
    # value in levels, as it is linear
    hsv: NDArray[Any] = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] += 360 * (shift % 1)  # degrees; the way back takes angles above 360, none below 0
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))  # type: ignore[return-value]


def to_gray(image: Pixels) -> Pixels:
    """The luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]


def blur(image: Pixels, sigma: float, kernel_px: int) -> Pixels:
    """Gaussian blur; the border is mirrored without its outermost pixel, as torchvision's ``reflect``."""
    kernel = cv2.getGaussianKernel(kernel_px, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)  # type: ignore[return-value]


def solarize(image: Pixels, threshold: int) -> Pixels:
    """Invert the values from ``threshold`` on."""
    values = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(values < threshold, values, 255 - values))  # type: ignore[return-value]


# in the order of color.OPERATIONS
ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
assert ADJUST[HUE] is adjust_hue


def apply_color(image: Pixels, color: Color, rule: ColorSettings) -> Pixels:
    """The drawn color of a view on its crop, in DINOv2's order: jitter, grayscale, blur, solarize."""
    jitter, order, factors, gray, sigma, solarized = color
    for operation in order if jitter else ():
        image = ADJUST[operation](image, factors[operation])
    if gray:
        image = to_gray(image)
    if sigma > 0:
        image = blur(image, sigma, rule.blur_kernel_px)
    return solarize(image, rule.solarize_threshold) if solarized else image


def render(
    image: Pixels, views: Views, colors: Colors, rule: ColorSettings, *, global_px: int, local_px: int
) -> tuple[Tensor, Tensor]:
    """All views of one image.

    Args:
        image: uint8 [H, W, 3].
        views, colors: its views, B = 1.

    Returns:
        global views [n_global, 3, global_px, global_px] and local views [n_local, 3, local_px, local_px],
        uint8. In memory the channels are last, as OpenCV leaves them; :func:`normalize` makes them contiguous
        on the training device.
    """
    n_views, n_global = views.flips.shape[1], views.n_global
    boxes, flips = pixel_boxes(views.boxes[0], *image.shape[:2]).int().tolist(), views.flips[0].tolist()
    sizes = (n_global, global_px), (n_views - n_global, local_px)
    crops = [np.empty((n, side, side, 3), np.uint8) for n, side in sizes]
    places = (place for group in crops for place in group)
    for place, box, flip, color in zip(places, boxes, flips, colors.rows(0)):
        place[:] = apply_color(crop_resize(image, box, flip, len(place)), color, rule)
    global_crops, local_crops = (torch.from_numpy(group).permute(0, 3, 1, 2) for group in crops)
    return global_crops, local_crops


def normalize(image: Tensor) -> Tensor:
    """Levels in [0, 255] (uint8 or float) [..., 3, H, W] -> contiguous float32, mean 0, std 1 (ImageNet's)."""
    mean, std = _mean_and_std(image.device)
    levels = torch.empty(image.shape, dtype=torch.float32, device=image.device).copy_(image)
    return levels.sub_(mean).div_(std)


@cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """[3, 1, 1] each, in levels; cached, because copying them at every step would wait for the device."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (MEAN, STD))
    return mean.to(device), std.to(device)
