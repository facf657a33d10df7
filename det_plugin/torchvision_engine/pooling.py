"""RoIAlign over pyramid levels as Detectron2 defines it (``ROIAlignV2``, ``assign_boxes_to_levels``)."""

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

CANONICAL_SIZE_PX, CANONICAL_LEVEL = 224, 4  # FPN (Lin et al., 2017), equation 1


def assign_levels(boxes: Tensor, lowest: int, highest: int) -> Tensor:
    """The pyramid level of each box (log2 of its stride), between ``lowest`` and ``highest``: [R, 4] pixels
    -> [R]."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size = (width * height).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE_PX + 1e-8))
    return level.clamp(lowest, highest).long()


class RoIPooler(nn.Module):
    """Boxes -> maps of one size, each box from the level that suits its size.

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
        """Maps [B, C, H_l, W_l] of the levels, boxes [R_i, 4] (pixels, an image each) -> [R, C, size, size],
        R over all images."""
        index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(boxes)], dim=1)  # [R, 5]
        lowest = self.strides[0].bit_length() - 1
        levels = assign_levels(rois[:, 1:], lowest, lowest + len(self.strides) - 1) - lowest
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.output_size, self.output_size)
        for i, (level_map, stride) in enumerate(zip(maps, self.strides)):
            here = torch.where(levels == i)[0]
            rows = roi_align(
                level_map, rois[here], self.output_size, 1 / stride, sampling_ratio=0, aligned=True
            )
            pooled.index_put_((here,), rows.to(pooled.dtype))
        return pooled
