"""The region proposal network: torchvision's, with Detectron2's anchors, box decoding and losses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.rpn import RPNHead as TorchvisionHead
from torchvision.ops import batched_nms, clip_boxes_to_image

from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine.layers import BoxCoder, Sizes


class Anchors(nn.Module):
    """Anchors, one size a level, not rounded; the first is centered on the image's corner."""

    def __init__(self, sizes_px: tuple[int, ...], ratios: tuple[float, ...], strides: list[int]) -> None:
        super().__init__()
        self.ratios, self.strides = ratios, strides
        for i, size in enumerate(sizes_px):
            widths = [math.sqrt(size**2 / ratio) for ratio in ratios]
            corners = [(w / 2, ratio * w / 2) for ratio, w in zip(ratios, widths)]
            cell = torch.tensor([(-x, -y, x, y) for x, y in corners])
            self.register_buffer(f"cell_{i}", cell, persistent=False)  # [A, 4]

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """[sum of H_l * W_l * A, 4] (pixels) for each image. They are all the same tensor."""
        levels = []
        for i, (level_map, stride) in enumerate(zip(maps, self.strides)):
            cell = self.get_buffer(f"cell_{i}")
            y, x = (torch.arange(side, device=cell.device) * stride for side in level_map.shape[2:])
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
            levels.append((shifts + cell).view(-1, 4))
        return [torch.cat(levels)] * len(images.image_sizes)


class RPNHead(TorchvisionHead):
    """torchvision's head. Its predictions are float32, also under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, H_l, W_l] -> objectness logits [B, A, H_l, W_l] and deltas [B, 4A, H_l, W_l]."""
        logits, deltas = super().forward(x)
        return [m.float().contiguous() for m in logits], [m.float().contiguous() for m in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """Proposals of every level, and the two losses of training, ``loss_rpn_cls`` and ``loss_rpn_loc``."""

    batched_nms = staticmethod(batched_nms)  # an export puts another in its place

    def __init__(self, protocol: DetectionProtocol, strides: list[int]) -> None:
        low, high = protocol.rpn_thresholds
        super().__init__(
            Anchors(protocol.anchor_sizes_px, protocol.anchor_ratios, strides),
            RPNHead(protocol.channels, len(protocol.anchor_ratios), protocol.rpn_convs),
            fg_iou_thresh=high,
            bg_iou_thresh=low,
            batch_size_per_image=protocol.rpn_batch_per_image,
            positive_fraction=protocol.rpn_positive_fraction,
            pre_nms_top_n=dict(zip(("training", "testing"), protocol.rpn_pre_nms)),
            post_nms_top_n=dict(zip(("training", "testing"), protocol.rpn_post_nms)),
            nms_thresh=protocol.rpn_nms,
        )
        self.box_coder, self.batch_per_image = BoxCoder((1.0, 1.0, 1.0, 1.0)), protocol.rpn_batch_per_image

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: Sizes, num_anchors_per_level: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best boxes of each level, clipped, after NMS within the level; then the best of all.

        They are sorted by logit. torchvision sorts by probability, and those near 1 tie in float32.

        Proposals [B, A, 4] pixels, objectness [B * A, 1] logits, shapes (height, width) without padding ->
        boxes [R_i, 4] and logits [R_i] of each image, best first.
        """
        logits, found = objectness.detach().view(len(image_shapes), -1), []
        best = self._get_top_n_idx(logits, num_anchors_per_level)  # [B, n]
        levels = [best.new_full((number,), i) for i, number in enumerate(num_anchors_per_level)]
        level_of = torch.cat(levels)  # [A]
        for boxes, scores, own, shape in zip(proposals, logits, best, image_shapes):
            boxes = clip_boxes_to_image(boxes[own], shape)
            solid = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]
            boxes, own = boxes[solid], own[solid]
            scores = scores[own]
            kept = self.batched_nms(boxes, scores, level_of[own], self.nms_thresh)[: self.post_nms_top_n()]
            found.append((boxes[kept], scores[kept]))
        return [boxes for boxes, _ in found], [scores for _, scores in found]

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of sampled anchors, L1 of positive ones, both over ``rpn_batch_per_image * images``.

        Args:
            objectness: [B * A, 1] logits.
            pred_bbox_deltas: [B * A, 4].
            labels: [A] an image: 1 object, 0 background, -1 neither.
            regression_targets: [A, 4] an image.
        """
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled = torch.where(positive | negative)[0]
        positive = torch.where(positive)[0]
        normalizer, target = self.batch_per_image * len(labels), torch.cat(labels)[sampled]
        loss_cls = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], target, reduction="sum")
        wanted = torch.cat(regression_targets)[positive]
        loss_loc = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum")
        return loss_cls / normalizer, loss_loc / normalizer

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Boxes [R_i, 4] (pixels, best first), and the losses by Detectron2's names (none in tests)."""
        boxes, losses = super().forward(images, features, targets)
        names = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc"}
        return boxes, {names[key]: value for key, value in losses.items()}
