"""The losses: pure functions, all in float32 or better.

The self-distillation losses read a :class:`pretrain.heads.HeadOutput`: bottleneck rows and K prototypes.
"""

from pretrain.losses.alignment import alignment_loss
from pretrain.losses.centering import (
    effective_rank,
    explained_share,
    sinkhorn_center,
    teacher_entropies,
    updated_center,
)
from pretrain.losses.distillation import image_loss, patch_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.pixels import masked_pixel_loss

__all__ = [
    "alignment_loss",
    "effective_rank",
    "explained_share",
    "image_loss",
    "koleo_loss",
    "masked_pixel_loss",
]
__all__ += ["patch_loss", "sinkhorn_center", "teacher_entropies", "updated_center"]
