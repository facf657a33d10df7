"""The patch loss of iBOT: the teacher's distribution of a patch that the student does not see."""

from torch import Tensor

from pretrain.heads import HeadOutput
from pretrain.losses.chunked_cross_entropy import cross_entropy_sum


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
        temperatures: of the student and of the teacher.
        n_rows: see :func:`pretrain.losses.chunked_cross_entropy.cross_entropy_sum`.

    Returns:
        a scalar.
    """
    # One view of M samples.
    student, teacher = (x._replace(bottleneck=x.bottleneck.unsqueeze(0)) for x in (student, teacher))
    weights = weights.to(center) / n_crops
    return cross_entropy_sum(student, teacher, center, center.new_ones(1, 1), weights, temperatures, n_rows)
