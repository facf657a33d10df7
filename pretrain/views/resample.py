"""Linear pixel operations as matrices: a resized, mirrored or blurred crop is ``Y @ image @ X^T``.

Batches of crops are [B, V, y, 3, x] with the channels between rows and columns. Then both products of all
views and channels are plain batched matrix products without a copy between them.
"""

import torch
from torch import Tensor


def resize_weights(start: Tensor, size: Tensor, length: int, out: int, flip: Tensor | None = None) -> Tensor:
    """Rows that crop [start, start + size) from ``length`` samples and resize it to ``out``, bicubic with
    antialiasing.

    Like ``F.interpolate(crop, antialias=True)``: Keys' kernel with a = -1/2, stretched if the crop shrinks,
    cut at the crop's border and normalized.

    Args:
        start, size: [...] whole pixels, as floats.
        flip: [...] bool, mirrors the result.

    Returns:
        [..., out, length], in the dtype of ``size``.
    """
    target = torch.arange(out, device=size.device, dtype=size.dtype) + 0.5
    if flip is not None:
        target = torch.where(flip[..., None], out - target, target)
    scale = (size / out)[..., None, None]
    # [..., 1, length]
    sample = torch.arange(length, device=size.device, dtype=size.dtype) + 0.5 - start[..., None, None]
    distance = (sample - target[..., None] * scale) / scale.clamp(min=1)  # [..., out, length]
    inside = (sample > 0) & (sample < size[..., None, None])
    weights = torch.where(inside, keys(distance), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def keys(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, a = -1/2, elementwise."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def blur_weights(sigma: Tensor, kernel_px: int, length: int) -> Tensor:
    """Rows of a Gaussian blur along ``length`` samples, the border as torchvision's ``reflect``.

    Args:
        sigma: [...] in samples; 0 gives the identity.

    Returns:
        [..., length, length].
    """
    offsets = torch.arange(kernel_px, device=sigma.device) - kernel_px // 2
    # sigma 0: exp(-huge) = 0 but at the center
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[..., None]) ** 2)
    kernel = kernel / kernel.sum(-1, keepdim=True)  # [..., kernel_px]
    places = torch.arange(length, device=sigma.device)[:, None] + offsets  # [length, kernel_px]
    places = length - 1 - (length - 1 - places.abs()).abs()
    # [length, kernel_px, length]
    taps = (places[..., None] == torch.arange(length, device=sigma.device)).to(sigma.dtype)
    return (kernel @ taps.transpose(0, 1).flatten(1)).unflatten(-1, (length, length))


def sandwich(left: Tensor, image: Tensor, right: Tensor) -> Tensor:
    """``left @ image @ right^T`` for each view and channel, in the dtype of the image.

    Args:
        left: [B, V, y, H]; right: [B, V, x, W].
        image: [B, H, 3, W], shared by the views of an image, or [B, V, H, 3, W].

    Returns:
        [B, V, y, 3, x].
    """
    n_images, n_views, height, _ = left.shape
    left, right = left.to(image.dtype), right.to(image.dtype)
    shared = 5 - image.dim()  # 1: one product for all views of an image
    # [B, V y, 3 W] or [B V, y, 3 W]
    half = torch.bmm(left.flatten(shared, shared + 1), image.flatten(0, 1 - shared).flatten(-2))
    half = half.reshape(n_images * n_views, height * 3, -1)  # [B V, 3 y, W]
    whole = torch.bmm(half, right.flatten(0, 1).transpose(1, 2))  # [B V, 3 y, x]
    return whole.unflatten(0, (n_images, n_views)).unflatten(2, (height, 3))
