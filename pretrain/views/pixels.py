"""The pixels of a view: crop, resize, flip, colour, normalise. CPU path, on uint8 tensors, with torchvision's own operations."""

from collections.abc import Sequence

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

from pretrain.views.boxes import Views, pixel_box
from pretrain.views.colour import Colour

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as DINOv2
STD = (0.229, 0.224, 0.225)


def crop_resize(image: Tensor, box: tuple[int, int, int, int], flip: bool, size_px: int) -> Tensor:
    """A crop (left, top, right, bottom) of [3, H, W] at [3, size, size], bicubic with antialiasing, flipped where asked."""
    left, top, right, bottom = box
    crop = TF.resize(image[:, top:bottom, left:right], [size_px, size_px], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return crop.flip(-1) if flip else crop


def apply_colour(image: Tensor, colour: Colour, blur_kernel_px: int, solarize_threshold: int) -> Tensor:
    """The drawn colour on a uint8 image [3, H, W], in DINOv2's order: jitter, greyscale, blur, solarize."""
    operations = (
        lambda x: TF.adjust_brightness(x, colour.brightness),
        lambda x: TF.adjust_contrast(x, colour.contrast),
        lambda x: TF.adjust_saturation(x, colour.saturation),
        lambda x: TF.adjust_hue(x, colour.hue),
    )
    for i in colour.order or ():
        image = operations[i](image)
    if colour.grey:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if colour.blur_sigma is not None:
        image = TF.gaussian_blur(image, [blur_kernel_px, blur_kernel_px], [colour.blur_sigma, colour.blur_sigma])
    if colour.solarize:
        image = TF.solarize(image, solarize_threshold)
    return image


def normalise(image: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, ImageNet mean 0 and standard deviation 1."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (MEAN, STD))
    return (image.float() - mean) / std


def render(
    image: Tensor,
    views: Views,
    colours: Sequence[Colour],
    *,
    global_px: int,
    local_px: int,
    blur_kernel_px: int,
    solarize_threshold: int,
) -> tuple[Tensor, Tensor]:
    """All views of one image.

    Args:
        image: uint8 [3, H, W].
        views: its views, B = 1.
        colours: one a view.

    Returns:
        global views [n_global, 3, global_px, global_px] and local views [n_local, 3, local_px, local_px], normalised float32.
    """
    height, width = image.shape[1:]
    pixels: list[Tensor] = []
    for view, colour in enumerate(colours):
        size = global_px if view < views.n_global else local_px
        box = pixel_box(views.boxes[0, view], height, width)
        crop = crop_resize(image, box, bool(views.flips[0, view]), size)
        pixels.append(apply_colour(crop, colour, blur_kernel_px, solarize_threshold))
    globals_, locals_ = pixels[: views.n_global], pixels[views.n_global :]
    empty = image.new_zeros(0, 3, local_px, local_px)
    return normalise(torch.stack(globals_)), normalise(torch.stack(locals_) if locals_ else empty)
