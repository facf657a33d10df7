"""What one training step sees: the crops of a batch, where they are, and what is masked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.views.boxes import Views
from pretrain.views.masks import Masks


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    Attributes:
        global_crops: [G * B, 3, S, S] normalised, view-major: all first global views, then all second ones.
        local_crops: [L * B, 3, s, s], view-major.
        views: boxes, flips and position boxes, [B, G + L].
        masks: of the global crops, [G * B, N].
    """

    global_crops: Tensor
    local_crops: Tensor
    views: Views
    masks: Masks

    @property
    def n_images(self) -> int:
        """B."""
        return len(self.views.boxes)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; the data loader calls this."""
        return Batch(self.global_crops.pin_memory(), self.local_crops.pin_memory(), self.views, self.masks)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Batch":
        """The same batch on another device; pixels in ``dtype``."""
        global_crops = self.global_crops.to(device, dtype, non_blocking=True)
        local_crops = self.local_crops.to(device, dtype, non_blocking=True)
        return Batch(global_crops, local_crops, self.views.to(device), self.masks.to(device))
