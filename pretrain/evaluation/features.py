"""What all probes share: pictures that stay in memory as small uint8 squares, and the features of a frozen backbone."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbones.vit import Tokens, ViT
from pretrain.views.pixels import normalise

FORWARD_BATCH = 32  # pictures a forward pass: probes run beside a training that already fills the memory


def square(pixels: np.ndarray, side_px: int, crop: bool) -> Tensor:
    """A picture as uint8 [3, side, side], by antialiased bicubic resizing.

    Args:
        pixels: uint8 [H, W, 3].
        crop: the central square of the picture; else all of it, squeezed.
    """
    height, width = pixels.shape[:2]
    if crop:
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        pixels = pixels[top : top + short, left : left + short]
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return F.interpolate(image, size=(side_px, side_px), mode="bicubic", antialias=True)[0].contiguous()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the time being; each part gets the mode back that it had."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training


@dataclass(frozen=True)
class Features:
    """The features of one backbone, which the caller holds :func:`frozen`.

    Attributes:
        backbone: on ``device``.
        autocast: context of the forward passes, entered anew for each.
    """

    backbone: ViT
    device: torch.device
    autocast: AbstractContextManager[Any]

    def __call__(self, images: Tensor, position_masks: Tensor | None = None) -> Iterator[Tokens]:
        """Tokens after the final norm, ``FORWARD_BATCH`` pictures at a time, in order.

        Args:
            images: uint8 [n, 3, S, S], whole images.
            position_masks: [n, N] bool, patches whose position is replaced by the position mask token.
        """
        dtype = self.backbone.patch_embed.proj.weight.dtype
        for start in range(0, len(images), FORWARD_BATCH):
            part = slice(start, start + FORWARD_BATCH)
            pixels = normalise(images[part].to(self.device)).to(dtype)
            masks = None if position_masks is None else position_masks[part].to(self.device)
            with self.autocast:
                tokens = self.backbone(pixels, position_mask=masks)
            yield Tokens(*(t if t.dtype == torch.float64 else t.float() for t in tokens))
