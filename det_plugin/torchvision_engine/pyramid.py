"""ViTDet's simple feature pyramid: every level from the last map of a plain ViT (Li et al., 2022, section
3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from det_plugin.features import FeatureOptions, detection_features, prepare
from det_plugin.torchvision_engine.layers import ConvNorm, get_norm
from pretrain.backbones.vit import ViT
from pretrain.errors import UserError


def pyramid_strides(patch_size: int, scales: tuple[float, ...]) -> list[int]:
    """Strides in pixels of the levels and of the max-pooled one: (4, 2, 1, .5) on patches of 16 give 4, 8,
    16, 32, 64.

    Raises:
        UserError: the strides are no powers of two.
    """
    strides = [patch_size / scale for scale in scales]
    if any(stride < 1 or not math.log2(stride).is_integer() for stride in strides):
        raise UserError(
            f"pyramid: patch_size {patch_size} and scales {scales} give strides {strides}, not powers of two"
        )
    return [int(stride) for stride in (*strides, 2 * strides[-1])]


class SimpleFeaturePyramid(nn.Module):
    """[B, D, h, w] -> one map a scale, each with ``channels`` channels, and a max-pooled level after the
    last.

    Keys are Detectron2's (``simfp_2`` ... ``simfp_5``, by the logarithm of the stride), so weights can be
    exchanged.

    Args:
        dim: D, of the ViT.
        patch_size: its stride in pixels.
        scales: 4, 2, 1, 0.5, or the end of it.
    """

    def __init__(
        self, dim: int, patch_size: int, channels: int, scales: tuple[float, ...], norm: str
    ) -> None:
        super().__init__()
        self.strides = pyramid_strides(patch_size, scales)
        self.levels = [int(math.log2(stride)) for stride in self.strides]
        for scale, level in zip(scales, self.levels):
            resize, width = _resize(dim, scale, norm)
            project = [ConvNorm(width, channels, 1, norm), ConvNorm(channels, channels, 3, norm)]
            self.add_module(f"simfp_{level}", nn.Sequential(*resize, *project))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, D, h, w] -> ``{"p2": [B, C, 4h, 4w], ..., "p6": [B, C, h / 4, w / 4]}``, highest resolution
        first."""
        maps = {f"p{level}": self.get_submodule(f"simfp_{level}")(x) for level in self.levels[:-1]}
        last = maps[f"p{self.levels[-2]}"]
        maps[f"p{self.levels[-1]}"] = F.max_pool2d(last, kernel_size=1, stride=2)
        return maps


def _resize(dim: int, scale: float, norm: str) -> tuple[list[nn.Module], int]:
    """The layers that change the resolution by ``scale``, and the width after them."""
    if scale == 4.0:
        first, second = (
            nn.ConvTranspose2d(dim, dim // 2, 2, stride=2),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        )
        return [first, get_norm(norm, dim // 2), nn.GELU(), second], dim // 4
    if scale == 2.0:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)], dim // 2
    return [nn.MaxPool2d(2, stride=2)] if scale == 0.5 else [], dim


class PyramidBackbone(nn.Module):
    """The ViT (key ``vit``) under its pyramid (key ``pyramid``)."""

    def __init__(self, vit: ViT, pyramid: SimpleFeaturePyramid, options: FeatureOptions) -> None:
        super().__init__()
        self.vit, self.pyramid, self.options = vit, pyramid, options
        prepare(vit, options)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, S, S] normalized pixels -> the pyramid's maps."""
        features = detection_features(self.vit, x, self.options)  # [B, D, S / p, S / p]
        return self.pyramid(features.contiguous(memory_format=torch.channels_last))
