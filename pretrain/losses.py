"""The four losses (paper eq. 1-6) and the two ways to make a teacher's distribution. Pure functions.

Logits are [..., K] over K prototypes. Everything is computed in float32 (float64 stays float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed import gather_rows, rank, sum_over_ranks


def _full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_center(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Teacher distribution by centering and sharpening (DINO): softmax((logits - center) / temperature).

    Args:
        logits: [M, K].
        center: [1, K].
    """
    return F.softmax((_full(logits) - center) / temperature, dim=-1)


def updated_center(center: Tensor, logits: Tensor, momentum: float = 0.9) -> Tensor:
    """The next centre [1, K]: a running mean of the teacher's logits [M, K], as global sum / global count over the ranks.

    No rows on any rank leave the centre as it is.
    """
    rows = _full(logits)
    total = torch.cat([rows.sum(0), rows.new_tensor([float(len(rows))])])  # one reduction for sum and count
    total = sum_over_ranks(total)
    count = total[-1]
    mean = total[:-1].unsqueeze(0) / count.clamp(min=1)
    return torch.where(count > 0, center * momentum + mean * (1 - momentum), center)


def sinkhorn_knopp(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Teacher distribution by Sinkhorn-Knopp (SwAV, DINOv2): every prototype receives the same mass over all ranks' samples.

    Args:
        logits: [M, K]; ranks may hold different M.

    Returns:
        [M, K], rows summing to 1.
    """
    scores = _full(logits) / temperature
    n_prototypes = scores.shape[1]
    count = sum_over_ranks(scores.new_tensor([float(len(scores))]))
    # exp(score - row maximum) differs from exp(score) by a factor a row, which the first normalisation of the columns would have to
    # undo; a global shift instead is exact and keeps the exponent in range.
    peak = scores.amax() if len(scores) else scores.new_full((), -torch.inf)
    q = torch.exp(scores - _max_over_ranks(peak))  # [M, K]
    q = q / sum_over_ranks(q.sum())
    for _ in range(n_iterations):
        q = q / (sum_over_ranks(q.sum(0, keepdim=True)) * n_prototypes)
        q = q / (q.sum(1, keepdim=True) * count)
    return q * count


def _max_over_ranks(x: Tensor) -> Tensor:
    gathered = gather_rows(x.reshape(1, 1))
    return gathered.amax()


def cross_entropy(student_logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """-sum_k teacher_k log softmax(student / temperature)_k for each row: [..., K] -> [...]."""
    return -(teacher * F.log_softmax(_full(student_logits) / temperature, dim=-1)).sum(-1)


def image_loss(student_global: Tensor, student_local: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """L_image (eq. 1): the teacher's [CLS] distribution of a global view against the student's of every other view.

    Mean over all pairs of different views, as DINOv2 scales it: G (G - 1) + G L terms, each a mean over the images.

    Args:
        student_global: logits [G, B, K]; student_local: logits [L, B, K]; teacher: distributions [G, B, K].
    """
    n_global, n_local = len(student_global), len(student_local)
    n_terms = n_global * (n_global - 1) + n_global * n_local
    total = student_global.new_zeros((), dtype=teacher.dtype)
    # The cross-entropy is linear in the teacher: one pass a student view against the sum of the views that it is paired with.
    everyone = teacher.sum(0)  # [B, K]
    for view, logits in enumerate(student_global):
        total = total + cross_entropy(logits, everyone - teacher[view], temperature).mean()
    for logits in student_local:
        total = total + cross_entropy(logits, everyone, temperature).mean()
    return total / max(n_terms, 1)


def patch_loss(student_logits: Tensor, teacher: Tensor, weights: Tensor, n_crops: int, temperature: float) -> Tensor:
    """L_content and L_pos (eq. 2, 4, 5) at the masked patches.

    Args:
        student_logits: [M, K] of all masked patches of one kind.
        teacher: distributions [M, K] of the same patches.
        weights: [M], 1 / number of masked patches of the patch's crop (:func:`mask_weights`).
        n_crops: number of global crops of this rank, masked or not (DINOv2's divisor).
    """
    return (cross_entropy(student_logits, teacher, temperature) * weights).sum() / n_crops


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
        rows = F.normalize(_full(cls_tokens), dim=-1, eps=eps)
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
