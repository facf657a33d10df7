"""The losses of self-distillation: DINO's of images, iBOT's of patches that the student does not see."""

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
        temperatures, n_rows: see :func:`pretrain.losses.chunked_cross_entropy.cross_entropy_sum`.

    Returns:
        a scalar.
    """
    n_views, n_images = student.bottleneck.shape[:2]
    n_global = len(teacher.bottleneck)
    different = 1 - torch.eye(n_views, n_global, device=center.device, dtype=center.dtype)  # [G + L, G]
    pairs = different / max(n_views * n_global - n_global, 1)
    weights = center.new_full((n_images,), 1 / n_images)
    return cross_entropy_sum(student, teacher, center, pairs, weights, temperatures, n_rows)


def patch_loss(
    student: HeadOutput,
    teacher: HeadOutput,
    center: Tensor,
    weights: Tensor,
    n_crops: int,
    temperatures: tuple[float, float],
    n_rows: int,
) -> Tensor:
    """L_content and L_pos (paper eq. 2, 4, 5) at the masked patches.

    Args:
        student, teacher: bottleneck [M, d] of all masked patches of one kind.
        center: [1, K], of the teacher's logits.
        weights: [M], 1 / number of masked patches of the patch's crop.
        n_crops: number of global crops of this rank, masked or not (DINOv2's divisor).
        temperatures, n_rows: see :func:`pretrain.losses.chunked_cross_entropy.cross_entropy_sum`.

    Returns:
        a scalar.
    """
    # One view of M samples.
    student, teacher = (x._replace(bottleneck=x.bottleneck.unsqueeze(0)) for x in (student, teacher))
    weights = weights.to(center) / n_crops
    return cross_entropy_sum(student, teacher, center, center.new_ones(1, 1), weights, temperatures, n_rows)
