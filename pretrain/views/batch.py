"""The input of one training step: the crops of a batch, where they are, and what is masked."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain.views.boxes import Views
from pretrain.views.masks import Masks
from pretrain.views.pixels import normalize
from pretrain.views.records import Record


@dataclass(frozen=True)
class Batch(Record):
    """One rank's share of a step (or of one of its accumulated parts).

    The loader gives crops as bytes, a quarter of the traffic between processes and to the device; :meth:`to`
    normalizes there.

    Attributes:
        global_crops: [G * B, 3, S, S] uint8 levels, or normalized floats; view-major: first all first views,
            then all second ones.
        local_crops: [L * B, 3, s, s], the same, view-major.
        views: boxes, flips and position boxes, [B, G + L].
        masks: of the global crops, [G * B, N]; ``None`` for a method that masks nothing.
    """

    global_crops: Tensor
    local_crops: Tensor
    views: Views
    masks: Masks | None

    @property
    def n_images(self) -> int:
        """B."""
        return len(self.views.boxes)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Batch":
        """The same batch on another device, pixels in ``dtype``; bytes are normalized."""
        here = super().to(device)
        crops = [normalize(c) if c.dtype == torch.uint8 else c for c in (here.global_crops, here.local_crops)]
        return replace(here, global_crops=crops[0].to(dtype), local_crops=crops[1].to(dtype))
