"""The image loss of DINO: one distribution of each image, the same in all of its views."""

import torch
from torch import Tensor

from pretrain.heads import HeadOutput
from pretrain.losses.chunked_cross_entropy import cross_entropy_sum


def image_loss(
    student: HeadOutput, teacher: HeadOutput, center: Tensor, temperatures: tuple[float, float], n_rows: int
) -> Tensor:
    """L_image (paper eq. 1): the [CLS] of every other view predicts the teacher's of a global view.

    The mean over all such pairs, as DINOv2 scales it: G (G - 1) + G L terms, each a mean over the images.

    Args:
        student: bottleneck [G + L, B, d], global views first.
        teacher: bottleneck [G, B, d].
        center: [1, K], of the teacher's logits.
        temperatures: of the student and of the teacher.
        n_rows: see :func:`pretrain.losses.chunked_cross_entropy.cross_entropy_sum`.

    Returns:
        a scalar.
    """
    n_views, n_images = student.bottleneck.shape[:2]
    n_global = len(teacher.bottleneck)
    different = 1 - torch.eye(n_views, n_global, device=center.device, dtype=center.dtype)  # [G + L, G]
    pairs = different / max(n_views * n_global - n_global, 1)
    weights = center.new_full((n_images,), 1 / n_images)
    return cross_entropy_sum(student, teacher, center, pairs, weights, temperatures, n_rows)
