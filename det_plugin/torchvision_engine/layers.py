"""The layers that the pyramid and the heads are made of, with Detectron2's parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import UserError

NORMS = ("LN", "")


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of a map, at each position (Detectron2's ``LN``)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x.permute(0, 2, 3, 1)  # free if x is channels-last, as all maps of this engine are
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """Convolution, an optional norm (key ``norm``; it replaces the bias), an optional ReLU.

    Args:
        norm: ``LN`` | ``""`` (none).
    """

    def __init__(
        self, channels: int, out_channels: int, kernel_size: int, norm: str = "", relu: bool = False
    ) -> None:
        super().__init__(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.norm = get_norm(norm, out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        x = self.norm(super().forward(x))
        return F.relu(x) if self.relu else x


def get_norm(name: str, channels: int) -> nn.Module:
    """The layer that the protocol's ``norm`` names.

    Raises:
        UserError: the engine has no such norm.
    """
    if name not in NORMS:
        raise UserError(f"protocol: norm={name!r} is none of {NORMS}")
    return LayerNorm2d(channels) if name else nn.Identity()
