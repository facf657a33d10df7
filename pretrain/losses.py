"""The four losses (paper eq. 1-6) and the two ways to make a teacher's distribution. Pure functions.

Tokens come as :class:`pretrain.prototypes.Projection`: bottleneck rows and K prototypes. Everything is computed in float32 (float64
stays float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed import gather_rows, max_over_ranks, rank, sum_over_ranks
from pretrain.prototypes import Projection, at_least_float32, cross_entropy_sum, distribution


def updated_center(center: Tensor, teacher: Projection, momentum: float = 0.9) -> Tensor:
    """The next centre [1, K]: a running mean of the teacher's logits, as global sum / global count over the ranks (DINO).

    The mean of the logits is the mean of the rows times the prototypes: the logits are not needed. No rows on any rank leave the
    centre as it is.

    Args:
        center: [1, K].
        teacher: rows [M, d]; ranks may hold different M, and the same prototypes.
    """
    rows = at_least_float32(teacher.rows)
    total = sum_over_ranks(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))  # one reduction for sum and count
    count = total[-1]
    with torch.autocast(rows.device.type, enabled=False):
        mean = (total[:-1] / count.clamp(min=1)).unsqueeze(0) @ at_least_float32(teacher.prototypes).T
    return torch.where(count > 0, center * momentum + mean * (1 - momentum), center)


def sinkhorn_center(teacher: Projection, temperature: float, n_iterations: int = 3, n_rows: int = 512) -> Tensor:
    """Sinkhorn-Knopp (SwAV, DINOv2) as a centre: softmax((logits - center) / temperature) is its distribution.

    Every prototype receives the same mass over all ranks' samples. The alternation scales rows and columns of exp(logits /
    temperature) by turns and ends with the rows, which is what softmax does: only the column factors v remain, and
    center = -temperature log v. They are found without holding the table, by going over it in chunks.

    Args:
        teacher: rows [M, d]; ranks may hold different M.
        n_rows: rows whose logits exist at a time; 0: all.

    Returns:
        [1, K].
    """
    rows, table = at_least_float32(teacher.rows), at_least_float32(teacher.prototypes)
    chunks = rows.split(n_rows or max(len(rows), 1))
    with torch.autocast(rows.device.type, enabled=False):
        # A global shift keeps the exponent in range and changes nothing.
        peaks = [(chunk @ table.T).amax() for chunk in chunks if len(chunk)]
        peak = max_over_ranks(torch.stack(peaks).amax() if peaks else rows.new_full((), -torch.inf))
        columns = None  # v [K]
        for _ in range(n_iterations):
            mass = rows.new_zeros(len(table))
            for chunk in chunks:
                scores = ((chunk @ table.T - peak) / temperature).exp_()  # [m, K]
                mass += scores.sum(0) if columns is None else (1 / (scores @ columns)) @ scores
            columns = 1 / sum_over_ranks(mass)
        assert columns is not None
        log_columns = columns.log()
        return -temperature * (log_columns - log_columns.mean()).unsqueeze(0)


def image_loss(student: Projection, teacher: Projection, center: Tensor, temperatures: tuple[float, float], n_rows: int) -> Tensor:
    """L_image (eq. 1): the teacher's [CLS] distribution of a global view against the student's of every other view.

    Mean over all pairs of different views, as DINOv2 scales it: G (G - 1) + G L terms, each a mean over the images.

    Args:
        student: rows [G + L, B, d], global views first; teacher: rows [G, B, d].
        temperatures: of the student and of the teacher.
        n_rows: see :func:`pretrain.prototypes.cross_entropy_sum`.
    """
    n_views, n_images = student.rows.shape[:2]
    different = 1 - torch.eye(n_views, len(teacher.rows), device=center.device, dtype=center.dtype)  # [R, T]
    pairs = different / max(n_views * len(teacher.rows) - len(teacher.rows), 1)
    weights = center.new_full((n_images,), 1 / n_images)
    return cross_entropy_sum(student, teacher, center, pairs, weights, temperatures, n_rows)


def patch_loss(
    student: Projection,
    teacher: Projection,
    center: Tensor,
    weights: Tensor,
    n_crops: int,
    temperatures: tuple[float, float],
    n_rows: int,
) -> Tensor:
    """L_content and L_pos (eq. 2, 4, 5) at the masked patches.

    Args:
        student, teacher: rows [M, d] of all masked patches of one kind.
        weights: [M], 1 / number of masked patches of the patch's crop (:func:`mask_weights`).
        n_crops: number of global crops of this rank, masked or not (DINOv2's divisor).
        temperatures: of the student and of the teacher.
    """
    students = Projection(student.rows.unsqueeze(0), student.prototypes)
    teachers = Projection(teacher.rows.unsqueeze(0), teacher.prototypes)
    return cross_entropy_sum(students, teachers, center, center.new_ones(1, 1), weights.to(center) / n_crops, temperatures, n_rows)


def teacher_entropies(teacher: Projection, center: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How far the teacher is from collapse: mean entropy of its distributions, and entropy of their mean, in nats (at most ln K).

    The first near ln K: everything looks alike; the second near 0: one prototype takes all.

    Args:
        teacher: rows [M, d], few enough for their logits.
    """
    p = distribution(teacher, center, temperature)
    mean = sum_over_ranks(p.mean(0))
    mean = mean / mean.sum()
    return -torch.xlogy(p, p).sum(1).mean(), -torch.xlogy(mean, mean).sum()


def mask_weights(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[C, N] bool -> [M]: for each masked patch, row-major, 1 / masked patches of its crop."""
    counts = mask.sum(1, keepdim=True).clamp(min=1).to(dtype)
    return (1.0 / counts).expand(mask.shape)[mask]


def koleo_loss(cls_tokens: Tensor, scope: str = "global", eps: float = 1e-8) -> Tensor:
    """KoLeo (Sablayrolles et al. 2019): -mean log distance to the nearest other sample, on normalised rows.

    Args:
        cls_tokens: [B, D] of one global view.
        scope: ``global``: neighbours over all ranks | ``local``: within this rank (DINOv2).
    """
    with torch.autocast(device_type=cls_tokens.device.type, enabled=False):
        rows = F.normalize(at_least_float32(cls_tokens), dim=-1, eps=eps)
        others = gather_rows(rows) if scope == "global" else rows
        if len(others) < 2:
            return rows.sum() * 0.0  # a single image has no neighbour
        with torch.no_grad():
            similarity = rows @ others.T  # [B, W * B]
            first = rank() * len(rows) if scope == "global" else 0
            own = torch.arange(len(rows), device=rows.device)
            similarity[own, own + first] = -1
            nearest = F.one_hot(similarity.argmax(1), len(others)).to(rows.dtype)
        neighbour = nearest @ others  # a product, not an index: its backward pass is deterministic
        distance = F.pairwise_distance(rows, neighbour, eps=eps)
        return -torch.log(distance + eps).mean()
