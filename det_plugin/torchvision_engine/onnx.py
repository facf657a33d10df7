"""A run's detector as one ONNX file: an image of any size in, boxes, scores, labels and masks out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

PRECISION = 22  # bits of Pillow's weights
TRICK_BOXES = 1000


@torch.library.custom_op("posfield::separate_nms", mutates_args=())
def separate_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """NMS of each class."""
    kept = []
    for own in scores:
        here = torch.where(own > -torch.inf)[0]
        kept.append(here[nms(boxes[here], own[here], threshold)])
    return torch.cat(kept)


@separate_nms.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def onnx_nms(boxes, scores, threshold: float):
    from onnxscript import opset18 as op

    lowest = op.Constant(value_floats=[-3.4e38])
    limit = op.Constant(value_floats=[threshold])
    found = op.NonMaxSuppression(
        op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
        op.Unsqueeze(scores, op.Constant(value_ints=[0])),
        op.Constant(value_ints=[2**31 - 1]),
        limit,
        lowest,
    )
    return op.Squeeze(
        op.Slice(found, op.Constant(value_ints=[2]), op.Constant(value_ints=[3]), op.Constant(value_ints=[1])),
        op.Constant(value_ints=[1]),
    )


def batched_nms_of(n_classes: int):
    def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
        n = torch.scalar_tensor(boxes.shape[0], dtype=torch.int64)
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
        shift = torch.where(n <= TRICK_BOXES, classes.to(boxes) * (largest + 1), 0.0)
        is_own = classes == torch.arange(n_classes)[:, None]
        kept = separate_nms(boxes + shift[:, None], torch.where(is_own, scores, -torch.inf), threshold)
        return kept[scores[kept].sort(descending=True)[1]]

    return batched_nms


def resized_sides(height: int, width: int, size_px: int) -> Tensor:
    """[2] int64 evaluation_geometry"""
    source = torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in (height, width)])
    shortest = source.min()
    sides = torch.where(source == shortest, float(size_px), source * (size_px / shortest))
    back = (size_px / sides.max()).clamp(max=1.0)
    return (sides * back + 0.5).floor().long().clamp(min=1)


def resize_weights(source: int, resized: Tensor, size: int) -> Tensor:
    """[size, source] float64"""
    x, o = 2 * torch.arange(source) + 1, 2 * torch.arange(size)[:, None] + 1
    longer = resized.clamp(min=source)
    share = (2 * longer - (x * resized - o * source).abs()).clamp(min=0)
    total = share.sum(1, keepdim=True).clamp(min=1)
    return ((share * 2 ** (PRECISION + 1) + total) // (2 * total)).double()


def _rounded(levels: Tensor) -> Tensor:
    return ((levels + 2 ** (PRECISION - 1)) / 2**PRECISION).floor()


class ExportedDetector(nn.Module):
    def __init__(self, model, protocol, category_ids: Sequence[int]) -> None:
        super().__init__()
        self.model, self.size_px = model, protocol.image_size_px
        self.register_buffer("category_ids", torch.tensor(category_ids))
        vit = model.backbone.vit
        side = model.transform.size
        grid = vit.grid_of((side, side))
        with torch.no_grad():
            position, buckets = vit.positions(grid).clone(), vit.buckets(grid)
        vit.positions = lambda grid, boxes=None, flips=None: position
        vit.buckets = lambda grid: buckets

    def forward(self, image: Tensor, min_score: Tensor):
        model = self.model
        height, width = image.shape[2:]
        resized = resized_sides(height, width, self.size_px)
        side = model.transform.size
        rows = resize_weights(height, resized[0], side)
        columns = resize_weights(width, resized[1], side)
        pixels = _rounded(rows @ _rounded(image[0].double() @ columns.T)).float()
        place = torch.arange(side)
        inside = (place < resized[0])[:, None] & (place < resized[1])
        batch = torch.where(inside, (pixels - model.transform.mean) / model.transform.std, 0.0)[None]
        shape = resized[0].item(), resized[1].item()
        for s in shape:
            torch._check(s >= 1)
            torch._check(s <= side)
        model.rpn.batched_nms = batched_nms_of(len(model.rpn.anchor_generator.strides))
        model.roi_heads.batched_nms = batched_nms_of(model.roi_heads.box_head.cls_score.out_features - 1)
        model.roi_heads.score_thresh = min_score
        maps = model.backbone(batch)
        proposals, _ = model.rpn(ImageList(batch, [shape]), maps)
        (found,), _ = model.roi_heads(maps, proposals, [shape])
        size = torch.stack([torch.scalar_tensor(s, dtype=torch.float64) for s in (width, height)])
        scale = (size / resized.flip(0)).float().repeat(2)
        boxes = (found["boxes"] * scale).clamp(min=0).minimum(size.float().repeat(2))
        solid = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]
        boxes = boxes[solid]
        out = [boxes, found["scores"][solid], self.category_ids[found["labels"][solid] - 1]]
        if "masks" in found:
            out.append(paste(found["masks"][solid, 0], boxes, height, width))
        return tuple(out)


def paste(masks, boxes, height, width):
    return masks
