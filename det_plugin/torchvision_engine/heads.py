"""Box and mask heads, or box heads alone: torchvision's matching and sampling around Detectron2's layers, losses and test-time
filtering.

Numbers of boxes are read from shapes: in an export they are symbols, and ``len`` asks for a number.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image

from det_plugin.coco.masks import crop_masks
from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine.layers import BoxCoder, ConvNorm, RoIPooler, Sizes


class BoxHead(nn.Module):
    """Convolutions, a linear layer, class logits and box offsets (Detectron2's ``FastRCNN*``)."""

    def __init__(self, protocol: DetectionProtocol) -> None:
        super().__init__()
        self.convs = _convs(protocol, protocol.box_convs)
        self.fc = nn.Linear(protocol.channels * protocol.box_pool**2, protocol.box_fc)
        self.cls_score = nn.Linear(protocol.box_fc, 1 + protocol.num_classes)
        self.bbox_pred = nn.Linear(protocol.box_fc, 4 * protocol.num_classes)
        _msra_fill(self.convs)
        nn.init.kaiming_uniform_(self.fc.weight, a=1)  # Detectron2's c2_xavier_fill
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for linear in (self.fc, self.cls_score, self.bbox_pred):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled maps [R, C, s, s] -> logits [R, 1 + K], background first, and offsets [R, 4 + 4K]."""
        x = F.relu(self.fc(self.convs(x).flatten(1)))
        return self.cls_score(x).float(), F.pad(self.bbox_pred(x).float(), (4, 0))


class MaskHead(nn.Module):
    """Convolutions, one upsampling by 2, a map of logits for each class (``MaskRCNNConvUpsampleHead``)."""

    def __init__(self, protocol: DetectionProtocol) -> None:
        super().__init__()
        width = protocol.channels
        self.convs = _convs(protocol, protocol.mask_convs)
        self.deconv = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.predictor = nn.Conv2d(width, protocol.num_classes, 1)
        _msra_fill(self.convs)
        _msra_fill(self.deconv)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.constant_(self.predictor.get_parameter("bias"), 0)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, s, s] -> logits [R, K, 2s, 2s]."""
        return self.predictor(F.relu(self.deconv(self.convs(x)))).float()


def _convs(protocol: DetectionProtocol, number: int) -> nn.Sequential:
    width, norm = protocol.channels, protocol.norm
    return nn.Sequential(*(ConvNorm(width, width, 3, norm, relu=True) for _ in range(number)))


def _msra_fill(module: nn.Module) -> None:
    """Detectron2's c2_msra_fill of every convolution in it."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def box_losses(logits: Tensor, offsets: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and L1 of the offsets, both over the number of **all** sampled boxes (Detectron2).

    Args:
        logits: [R, 1 + K], class 0 is background.
        offsets: [R, 4 + 4K].
        labels: [R] in 0 ... K.
        targets: [R, 4] encoded offsets.
    """
    objects = torch.where(labels > 0)[0]
    predicted = offsets.unflatten(1, (-1, 4))[objects, labels[objects]]  # [P, 4]
    number = max(len(labels), 1)
    loss_box = F.l1_loss(predicted, targets[objects], reduction="sum") / number
    return F.cross_entropy(logits, labels, reduction="sum") / number, loss_box


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of the true class's maps; 0 without objects.

    Args:
        logits: [P, K, s, s].
        labels: [P] in 1 ... K.
        targets: [P, s, s] in {0, 1}.
    """
    if len(labels) == 0:
        return logits.sum() * 0
    own = logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return F.binary_cross_entropy_with_logits(own, targets)


class DetectionHeads(RoIHeads):
    """Second stage: boxes of the proposals, and masks where the protocol has them."""

    batched_nms = staticmethod(batched_nms)  # an export puts another in its place

    def __init__(self, protocol: DetectionProtocol, strides: list[int]) -> None:
        super().__init__(
            box_roi_pool=RoIPooler(protocol.box_pool, strides),
            box_head=BoxHead(protocol),
            box_predictor=None,
            fg_iou_thresh=protocol.roi_threshold,
            bg_iou_thresh=protocol.roi_threshold,
            batch_size_per_image=protocol.roi_batch_per_image,
            positive_fraction=protocol.roi_positive_fraction,
            bbox_reg_weights=protocol.box_weights,
            score_thresh=protocol.score_threshold,
            nms_thresh=protocol.nms,
            detections_per_img=protocol.detections_per_image,
            mask_roi_pool=RoIPooler(protocol.mask_pool, strides) if protocol.has_masks else None,
            mask_head=MaskHead(protocol) if protocol.has_masks else None,
        )
        self.box_coder = BoxCoder(protocol.box_weights)

    def has_mask(self) -> bool:
        """torchvision looks for a separate mask predictor, but ours is part of the head."""
        return self.mask_head is not None

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses in training, detections in tests. The other one is empty.

        Args:
            features: the pyramid's maps; the last, max-pooled level is not used.
            proposals, image_shapes: [R_i, 4] pixels; (height, width) without padding.
            targets: ``boxes`` [M, 4] float, ``labels`` [M] in 1 ... K, for a mask head ``masks``, [M, h, w]
                uint8 or :class:`masks.Polygons`, and perhaps ``has_mask`` [M] bool: which of them teach.

        Returns:
            ``boxes`` [N, 4], ``labels`` [N] in 1 ... K, ``scores`` [N], of a mask head ``masks`` [N, 1, s, s]
            probabilities under the box; and ``loss_cls``, ``loss_box_reg``, ``loss_mask``.
        """
        maps = list(features.values())[:-1]
        if self.training:
            return [], self._losses(maps, proposals, targets)
        logits, offsets = self.box_head(self.box_roi_pool(maps, proposals))
        found = self.postprocess_detections(logits, offsets, proposals, image_shapes)
        detections = [dict(boxes=b, scores=s, labels=c) for b, s, c in zip(*found)]
        if self.has_mask():
            mask_logits = self.mask_head(self.mask_roi_pool(maps, found[0]))
            classes = torch.cat(found[2]) - 1
            own = mask_logits[torch.arange(classes.shape[0], device=classes.device), classes].sigmoid()
            of_each = [boxes.shape[0] for boxes in found[0]]
            for detection, masks in zip(detections, own[:, None].split(of_each)):
                detection["masks"] = masks
        return detections, {}

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: Sizes
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes [N, 4], scores [N], labels [N] in 1 ... K by image: clipped, above the threshold, after NMS.

        Boxes without extent stay until they are in the image's pixels again; torchvision drops them here.
        """
        counts = [own.shape[0] for own in proposals]
        decoded = self.box_coder.decode_single(box_regression, torch.cat(proposals))  # [R, 4 + 4K]
        decoded = decoded.reshape(*class_logits.shape, 4)
        all_boxes = decoded[:, 1:].split(counts)  # without the background
        all_scores = F.softmax(class_logits, -1)[:, 1:].split(counts)
        boxes, scores, labels = [], [], []
        for own_boxes, own_scores, shape in zip(all_boxes, all_scores, image_shapes):
            row, kind = torch.where(own_scores > self.score_thresh)
            candidates, chances = clip_boxes_to_image(own_boxes[row, kind], shape), own_scores[row, kind]
            kept = self.batched_nms(candidates, chances, kind, self.nms_thresh)[: self.detections_per_img]
            boxes.append(candidates[kept])
            scores.append(chances[kept])
            labels.append(kind[kept] + 1)
        return boxes, scores, labels

    def _losses(
        self, maps: list[Tensor], proposals: list[Tensor], targets: list[dict[str, Any]] | None
    ) -> dict[str, Tensor]:
        assert targets is not None
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_head(self.box_roi_pool(maps, proposals))
        loss_cls, loss_box = box_losses(logits, deltas, torch.cat(labels), torch.cat(offsets))
        losses = {"loss_cls": loss_cls, "loss_box_reg": loss_box}
        if not self.has_mask():
            return losses

        objects = [torch.where(label > 0)[0] for label in labels]
        for i, target in enumerate(targets):
            if "has_mask" in target:
                objects[i] = objects[i][target["has_mask"][matched[i][objects[i]]]]
        boxes = [proposal[o] for proposal, o in zip(proposals, objects)]
        mask_logits = self.mask_head(self.mask_roi_pool(maps, boxes))
        wanted = [
            crop_masks(target["masks"], index[o], box, mask_logits.shape[-1])
            for target, index, box, o in zip(targets, matched, boxes, objects)
        ]
        classes = torch.cat([label[o] for label, o in zip(labels, objects)])
        loss_mask = mask_loss(mask_logits, classes, torch.cat(wanted))
        return {**losses, "loss_mask": loss_mask}
