"""Boxes as offsets from reference boxes: R-CNN's parametrization with Detectron2's clamp, always in
float32."""

import math

import torch
from torch import Tensor

Weights = tuple[float, float, float, float]
MAX_LOG_SCALE = math.log(1000 / 16)  # Detectron2: turns a box of 16 px into one of 1000 px


def encode(targets: Tensor, references: Tensor, weights: Weights) -> Tensor:
    """Offsets from ``references`` to ``targets``: [R, 4], [R, 4] pixels (x0, y0, x1, y1) -> [R, 4] (dx, dy,
    dw, dh)."""
    (x, y, w, h), (tx, ty, tw, th) = _centers(references), _centers(targets)
    offsets = (tx - x) / w, (ty - y) / h, torch.log(tw / w), torch.log(th / h)
    return torch.stack([weight * offset for weight, offset in zip(weights, offsets)], dim=-1)


def decode(deltas: Tensor, references: Tensor, weights: Weights) -> Tensor:
    """The inverse, for K classes at once: [R, 4K], [R, 4] -> [R, K, 4] pixels."""
    x, y, w, h = (side[:, None] for side in _centers(references.float()))  # [R, 1]
    dx, dy, dw, dh = (
        delta / weight for delta, weight in zip(deltas.float().unflatten(1, (-1, 4)).unbind(-1), weights)
    )
    x, y = x + dx * w, y + dy * h
    half_w = w * dw.clamp(max=MAX_LOG_SCALE).exp() / 2
    half_h = h * dh.clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)


def _centers(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Corners [R, 4] -> center x, center y, width, height, each [R]."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    w, h = x1 - x0, y1 - y0
    return x0 + w / 2, y0 + h / 2, w, h


class BoxCoder:
    """The two functions as torchvision's detectors call them: with lists that hold a tensor for each
    image."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def encode(self, targets: list[Tensor], references: list[Tensor]) -> list[Tensor]:
        """[R_i, 4] and [R_i, 4] -> [R_i, 4]."""
        return [encode(target, reference, self.weights) for target, reference in zip(targets, references)]

    def decode(self, deltas: Tensor, references: list[Tensor]) -> Tensor:
        """[R, 4K] over all images and [R_i, 4] -> [R, K, 4]."""
        return decode(deltas, torch.cat(references), self.weights)
