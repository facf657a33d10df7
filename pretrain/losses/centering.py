"""Centers of a teacher's logits, against collapse: a running mean (DINO) or Sinkhorn-Knopp (SwAV, DINOv2).

Both are a center [1, K]: the teacher's distribution is softmax((logits - center) / temperature).
"""

import torch
from torch import Tensor

from pretrain.distributed import max_over_ranks, sum_over_ranks
from pretrain.heads import HeadOutput
from pretrain.losses.chunked_cross_entropy import distribution
from pretrain.precision import at_least_float32

ALIKE = 1e-3  # nats: of less the rounding of its two entropies, each of some nats, is seen


def updated_center(center: Tensor, teacher: HeadOutput, momentum: float = 0.9) -> Tensor:
    """The next center [1, K]: a running mean of the teacher's logits over all ranks (DINO).

    Global sum / global count. The mean of the logits is the mean bottleneck row times the prototypes, so it
    needs no logits. Without a row on any rank the center stays as it is.

    Args:
        center: [1, K].
        teacher: bottleneck [M, d]; ranks may hold different M, and the same prototypes.
        momentum: weight of the old center.
    """
    rows = at_least_float32(teacher.bottleneck)
    # One reduction for sum and count.
    total = sum_over_ranks(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))
    count = total[-1]
    with torch.autocast(rows.device.type, enabled=False):
        mean = (total[:-1] / count.clamp(min=1)).unsqueeze(0) @ at_least_float32(teacher.prototypes).T
    return torch.where(count > 0, center * momentum + mean * (1 - momentum), center)


def sinkhorn_center(
    teacher: HeadOutput, temperature: float, n_iterations: int = 3, n_rows: int = 512
) -> Tensor:
    """Sinkhorn-Knopp (SwAV, DINOv2) as a center [1, K].

    Every prototype receives the same mass over all ranks' samples. The iteration scales columns and rows of
    exp(logits / temperature) in turn and ends with the rows, as softmax does. So only the column factors v
    remain, and center = -temperature log v. They are found chunk by chunk, without holding the table.

    Args:
        teacher: bottleneck [M, d]; ranks may hold different M.
        temperature: of the teacher.
        n_iterations: of columns and rows.
        n_rows: rows whose logits exist at a time; 0: all.
    """
    rows, prototypes = at_least_float32(teacher.bottleneck), at_least_float32(teacher.prototypes)
    chunks = rows.split(n_rows or max(len(rows), 1))
    with torch.autocast(rows.device.type, enabled=False):
        # A global shift keeps the exponent in range and changes nothing.
        peaks = [(chunk @ prototypes.T).amax() for chunk in chunks if len(chunk)]
        peak = max_over_ranks(torch.stack(peaks).amax() if peaks else rows.new_full((), -torch.inf))
        columns = None  # v [K]
        for _ in range(n_iterations):
            mass = rows.new_zeros(len(prototypes))
            for chunk in chunks:
                scores = ((chunk @ prototypes.T - peak) / temperature).exp_()  # [m, K]
                mass += scores.sum(0) if columns is None else (1 / (scores @ columns)) @ scores
            columns = 1 / sum_over_ranks(mass)
        assert columns is not None
        log_columns = columns.log()
        return -temperature * (log_columns - log_columns.mean()).unsqueeze(0)


def teacher_entropies(teacher: HeadOutput, center: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How far the teacher is from collapse: mean entropy of its distributions, and entropy of their mean.

    In nats, at most ln K. The first near ln K: all looks alike. The second near 0: one prototype takes all.

    Args:
        teacher: bottleneck [M, d], few enough for all of their logits.
        center: [1, K].
        temperature: of the teacher.
    """
    p = distribution(teacher, center, temperature)
    mean = sum_over_ranks(p.mean(0))
    mean = mean / mean.sum()
    return -torch.xlogy(p, p).sum(1).mean(), -torch.xlogy(mean, mean).sum()


def explained_share(
    teacher: HeadOutput, center: Tensor, temperature: float, weights: Tensor, loss: Tensor, n_rows: int
) -> tuple[Tensor, Tensor]:
    """What is left to predict in the teacher's distributions p_n, and how much of it the student q_n predicts (ours).

    A student that ignores its input does best with the mean p of all p_n, which costs the entropy of p. So a
    falling loss says nothing before it is below that, and the share is that of what lies between:

        1 - mean KL(p_n || q_n) / mean KL(p_n || p)  =  (H(p) - mean H(p_n, q_n)) / (H(p) - mean H(p_n))

    All means are weighted, and go over all ranks.

    Args:
        teacher: bottleneck [M, d]; ranks may hold different M.
        center: [1, K].
        temperature: of the teacher.
        weights: [M].
        loss: sum of weights_n H(p_n, q_n) of this rank, a scalar.
        n_rows: rows whose K logits exist at a time; 0: all.

    Returns:
        mean H(p_n), in nats, and the share: 1 for a perfect student, 0 for the mean prediction, below 0 for
        worse; 0 where all p_n are alike (less than ``ALIKE`` to predict).
    """
    rows, prototypes = at_least_float32(teacher.bottleneck), at_least_float32(teacher.prototypes)
    weights = weights.to(rows)
    mean, entropy = rows.new_zeros(len(prototypes)), rows.new_zeros(())
    n_rows = n_rows or max(len(rows), 1)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk, weight in zip(rows.split(n_rows), weights.split(n_rows)):
            p = distribution(HeadOutput(chunk, prototypes), center, temperature)  # [m, K]
            mean += weight @ p
            entropy += weight @ torch.special.entr(p).sum(1)
        sums = sum_over_ranks(torch.cat([mean, torch.stack([entropy, loss.to(rows), weights.sum()])]))
    sums = sums / sums[-1].clamp(min=torch.finfo(sums.dtype).tiny)
    entropy, cross_entropy = sums[-3], sums[-2]
    of_mean = torch.special.entr(sums[:-3]).sum()
    left = of_mean - entropy
    return entropy, torch.where(left > ALIKE, (of_mean - cross_entropy) / left.clamp(min=ALIKE), 0)


def effective_rank(rows: Tensor) -> Tensor:
    """In how many directions rows [M, d] differ: exp of the entropy of the normalized singular values of the centered
    rows (Roy and Vetterli, 2007).

    Returns:
        a scalar from 1 to min(M, d); of rows that are all the same 1, NaN where a number is not finite.
    """
    with torch.autocast(rows.device.type, enabled=False):
        centered = at_least_float32(rows) - at_least_float32(rows).mean(0)
        # svdvals would raise an error of its own; the run's names the iteration and the terms
        values = torch.linalg.svdvals(torch.nan_to_num(centered, 0.0, 0.0, 0.0))
        p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return torch.where(centered.isfinite().all(), torch.special.entr(p).sum().exp(), torch.nan)
