"""Make the pixels of views on the training device: all crops of a batch at once, from decoded images.

The loader's workers only decode, draw numbers, and put the images on a canvas. :class:`CanvasBatch` makes the
crops where the training runs, globals in one group and locals in another. The operations are those of
:mod:`pretrain.views.pixels` with one number for each sample, in float without rounding between them: both
paths agree within a few levels of 255 (tests/test_device_pixels.py). The number of kernels does not depend on
the number of images, and nothing waits for the device.

Values are float16 on CUDA, exact to a sixteenth of a level, because tensor cores do the products and memory
bandwidth limits all else. Elsewhere they are float32. Memory, for a group of V views of side s: about eight
times its crops, or before them B * V * s * 3 * W values of the half-resized canvas (of width W) and a few
float32 copies of the weights, B * V * s * W each: about 1 GB for 64 images on canvases of 512 px.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.views.batch import Batch
from pretrain.views.boxes import Views, pixel_boxes
from pretrain.views.color import HUE, OPERATIONS, Colors, ColorSettings
from pretrain.views.masks import Masks
from pretrain.views.pixels import normalize
from pretrain.views.records import Record
from pretrain.views.resample import blur_weights, resize_weights, sandwich

LUMA = (0.299, 0.587, 0.114)
CONTRAST, SATURATION = OPERATIONS.index("contrast"), OPERATIONS.index("saturation")


@dataclass(frozen=True)
class CanvasBatch(Record):
    """One rank's share of a step before its crops are made.

    Attributes:
        canvas: [B, H, W, 3] uint8, each image in the top left corner.
        sizes: [B, 2] float32, height and width of each image in pixels.
        views, colors: [B, G + L].
        masks: of the global crops, [G * B, N], if any.
        rule: the colors' kernel and threshold.
        global_px, local_px: sides of the crops.
    """

    canvas: Tensor
    sizes: Tensor
    views: Views
    colors: Colors
    masks: Masks | None
    rule: ColorSettings
    global_px: int
    local_px: int

    @property
    def n_images(self) -> int:
        """B."""
        return len(self.canvas)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:  # type: ignore[override]
        """The batch that a step sees, its crops made on ``device``; pixels in ``dtype``."""
        here = super().to(device)
        n_global = self.views.n_global
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            image = here.canvas.permute(0, 1, 3, 2)  # [B, H, 3, W]
            image = image.to(working_dtype(device), memory_format=torch.contiguous_format)
            global_crops = here._render(image, slice(0, n_global), self.global_px)
            local_crops = here._render(image, slice(n_global, None), self.local_px)
        return Batch(global_crops.to(dtype), local_crops.to(dtype), here.views, here.masks)

    def _render(self, image: Tensor, views: slice, size_px: int) -> Tensor:
        """Some views' crops, view-major: [n * B, 3, size, size], normalized float32."""
        boxes, flips, colors = self.views.boxes[:, views], self.views.flips[:, views], self.colors.of(views)
        if not boxes.shape[1]:
            return torch.zeros(0, 3, size_px, size_px, device=image.device)
        boxes_px = pixel_boxes(boxes, *self.sizes[:, :, None].unbind(1))
        # [B, n, y, 3, x]
        pixels = apply_colors(crop_resize(image, boxes_px, flips, size_px), colors, self.rule)
        return normalize(pixels.permute(1, 0, 3, 2, 4).flatten(0, 1))


def working_dtype(device: torch.device) -> torch.dtype:
    """The dtype of pixels between operations."""
    return torch.float16 if device.type == "cuda" else torch.float32


def crop_resize(image: Tensor, boxes_px: Tensor, flips: Tensor, size_px: int) -> Tensor:
    """All crops of a batch, bicubic with antialiasing, as levels in [0, 255].

    Args:
        image: [B, H, 3, W] floating point.
        boxes_px: [B, V, 4] whole pixels, as floats.
        flips: [B, V] bool.

    Returns:
        [B, V, size, 3, size], rounded as the CPU path's bytes are.
    """
    left, top, right, bottom = boxes_px.unbind(-1)
    rows = resize_weights(top, bottom - top, image.shape[1], size_px)
    columns = resize_weights(left, right - left, image.shape[3], size_px, flips)
    return sandwich(rows, image, columns).round_().clamp_(0, 255)


def apply_colors(pixels: Tensor, colors: Colors, rule: ColorSettings) -> Tensor:
    """The drawn colors on crops, in DINOv2's order: jitter, grayscale, blur, solarize.

    Args:
        pixels: [B, V, y, 3, x] levels.
        colors: [B, V].
    """
    pixels = jitter(pixels, colors)
    pixels = torch.where(_per_sample(colors.gray), luma(pixels), pixels)
    blurs = blur_weights(colors.sigma, rule.blur_kernel_px, pixels.shape[-1])
    pixels = sandwich(blurs, pixels, blurs)
    inverted = _per_sample(colors.solarize) & (pixels.round() >= rule.solarize_threshold)
    return torch.where(inverted, 255 - pixels, pixels)


def jitter(pixels: Tensor, colors: Colors) -> Tensor:
    """Brightness, contrast, saturation and hue, each sample in its own order.

    The first three are blends, ``factor * pixels + (1 - factor) * other``, which factor 1 makes the identity.
    So three blends run before the hue and three after it, and each blend of a sample acts on its side of the
    hue: seven operations, not 4 x 4.
    """
    place_of_hue = (colors.order == HUE).int().argmax(-1)
    # in drawn order
    blends = colors.order.gather(-1, torch.argsort((colors.order == HUE).int(), dim=-1, stable=True))[..., :3]
    factors = torch.where(colors.jitter[..., None], colors.factors.gather(-1, blends), 1.0)
    for step in range(6):  # the three blends before the hue, then after it
        place, is_after = step % 3, step >= 3
        if step == 3:
            pixels = turn_hue(pixels, torch.where(colors.jitter, colors.factors[..., HUE], 0.0))
        here = torch.where((place >= place_of_hue) == is_after, factors[..., place], 1.0)
        pixels = blend(pixels, blends[..., place], here)
    return pixels


def blend(pixels: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast or saturation by ``operation``: a blend with black, mean gray or the gray image.

    Args:
        pixels: [B, V, y, 3, x] levels; operation, factor: [B, V].
    """
    gray = luma(pixels)  # [B, V, y, 1, x]
    mean = gray.mean((-3, -2, -1), keepdim=True)
    flat = torch.where(_per_sample(operation == CONTRAST), mean, 0.0)
    other = torch.where(_per_sample(operation == SATURATION), gray, flat)
    return torch.lerp(other, pixels, _per_sample(factor).to(pixels.dtype)).clamp_(0, 255)


def luma(pixels: Tensor) -> Tensor:
    """[..., y, 3, x] -> gray [..., y, 1, x]: ITU-R 601, as PIL, OpenCV and torchvision."""
    red, green, blue = pixels.split(1, dim=-2)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def turn_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` [B, V] of a full circle, in HSV: value and saturation stay.

    With h in sixths of the circle, channel c of a color is ``max - (max - min) * clamp(min(k, 4 - k), 0,
    1)``, where k = (n_c + h) mod 6 and n = 5, 3, 1.
    """
    red, green, blue = pixels.unbind(-2)  # [B, V, y, x]
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    nonzero = chroma.clamp(min=1e-3)  # gray has no hue; float16 holds nothing much smaller
    hue = torch.where(high == green, 2 + (blue - red) / nonzero, 4 + (red - green) / nonzero)
    hue = torch.where(high == red, (green - blue) / nonzero, hue)
    hue = hue + (6 * shift[..., None, None]).to(hue.dtype)
    channels = torch.stack([high.new_full((), n) for n in (5.0, 3.0, 1.0)]).view(3, 1)
    k = (hue.unsqueeze(-2) + channels) % 6  # [B, V, y, 3, x]
    return high.unsqueeze(-2) - chroma.unsqueeze(-2) * torch.minimum(k, 4 - k).clamp_(0, 1)


def _per_sample(values: Tensor) -> Tensor:
    """[B, V] -> [B, V, 1, 1, 1]."""
    return values[..., None, None, None]
