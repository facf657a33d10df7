"""What the pyramid and the heads are made of, as Detectron2 defines it: its norms with their parameter names,
box offsets, and RoIAlign over pyramid levels."""

import torch
import torch.nn.functional as F
import torchvision.models.detection._utils as torchvision_detection
from torch import Tensor, nn
from torchvision.ops import roi_align

from pretrain.errors import UserError

NORMS = ("LN", "")
Sizes = list[tuple[int, int]]  # height, width of each image
CANONICAL_SIZE_PX, CANONICAL_LEVEL = 224, 4  # FPN (Lin et al., 2017), equation 1


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


class BoxCoder(torchvision_detection.BoxCoder):
    """Box offsets. The weights multiply last, unlike in torchvision: a resumed run goes on to the bit."""

    def encode_single(self, targets: Tensor, references: Tensor) -> Tensor:
        """[R, 4], [R, 4] pixels (x0, y0, x1, y1) -> offsets [R, 4] (dx, dy, dw, dh)."""
        (x, y, w, h), (tx, ty, tw, th) = _centers(references), _centers(targets)
        offsets = (tx - x) / w, (ty - y) / h, torch.log(tw / w), torch.log(th / h)
        return torch.stack([weight * offset for weight, offset in zip(self.weights, offsets)], dim=-1)


def _centers(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Corners [R, 4] -> center x, center y, width, height, each [R]."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    w, h = x1 - x0, y1 - y0
    return x0 + w / 2, y0 + h / 2, w, h


def assign_levels(boxes: Tensor, lowest: int, highest: int) -> Tensor:
    """Each box's pyramid level (log2 of its stride): [R, 4] pixels -> [R] (``assign_boxes_to_levels``)."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size = (width * height).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE_PX + 1e-8))
    return level.clamp(lowest, highest).long()


class RoIPooler(nn.Module):
    """Boxes -> maps of one size, each box from the level that suits its size (Detectron2's ``ROIAlignV2``).

    Unlike torchvision's ``MultiScaleRoIAlign``, it is half-pixel aligned, and strides are given, not guessed
    from image sizes.

    Args:
        output_size: side of the pooled map.
        strides: of the levels in pixels, consecutive powers of two.
    """

    def __init__(self, output_size: int, strides: list[int]) -> None:
        super().__init__()
        self.output_size, self.strides = output_size, strides

    def forward(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """Maps [B, C, H_l, W_l], boxes [R_i, 4] (pixels) of each image -> [R, C, size, size], R over all."""
        # shapes, not len: in an export numbers of boxes are symbols
        index = torch.cat([box.new_full((box.shape[0], 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(boxes)], dim=1)  # [R, 5]
        lowest, size = self.strides[0].bit_length() - 1, self.output_size
        levels = assign_levels(rois[:, 1:], lowest, lowest + len(self.strides) - 1) - lowest
        pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], size, size)
        for i, (level_map, stride) in enumerate(zip(maps, self.strides)):
            here = torch.where(levels == i)[0]
            rows = roi_align(level_map, rois[here], size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled.index_put_((here,), rows.to(pooled.dtype))
        return pooled
