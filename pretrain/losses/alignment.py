"""How alike two sets of patch features are: the losses of PaKA and Gram anchoring.

* CKA, centered kernel alignment (Kornblith et al., 2019), PaKA's: the geometry of a region's patches.
* The Frobenius distance of the same kernels, which also sees how far the student's patches are apart.
* Gram anchoring (DINOv3): the mean squared difference of the cosines between all patches.

A region's features are [n, d]; regions come stacked, [R, n, d], and every Gram matrix is of one region.
Everything is computed in float32 (float64 stays float64), autocast or not. No guard is a fixed number:
nothing depends on the scale of the features, within what the squares of float32 hold (1e-12 to 1e12 and
more). What has no size, such as the spread of features that are all alike, contributes to neither pass. A NaN
stays a NaN.
"""

import torch
from torch import Tensor

from pretrain.precision import at_least_float32

ROUNDING = 32  # units in the last place: a relative spread this small is rounding of the mean


def alignment_loss(
    name: str, student: Tensor, teacher: Tensor, kernel: str = "linear", bandwidth: float = 1.0
) -> Tensor:
    """The loss of each region, [R]; 0 where the regions agree.

    Args:
        name: ``cka`` (1 - CKA) | ``frobenius`` | ``gram``.
        student, teacher: [R, n, d] and [R, n, e], the same places in the same order. Both get a gradient.
        kernel, bandwidth: of ``cka`` and ``frobenius``, see :func:`centered_kernel`.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = at_least_float32(student), at_least_float32(teacher)
        if name == "gram":
            return gram_distance(s, t)
        of_teacher = centered_kernel(t, kernel, bandwidth)
        if name == "cka":
            return 1 - alignment(centered_kernel(s, kernel, bandwidth), of_teacher)
        return frobenius_distance(centered_kernel(s, kernel, bandwidth, unit=t), of_teacher)


def centered_kernel(
    x: Tensor, kernel: str = "linear", bandwidth: float = 1.0, unit: Tensor | None = None
) -> Tensor:
    """H K H of the features of each region, K being their kernel and H = 1 - 1/n.

    The features are first centered and divided by their size |H X|: no change for CKA, and float32 needs it.
    Features that are all alike give zeros.

    Args:
        x: [R, n, d].
        kernel: ``linear``: <x_i, x_j> | ``rbf``: exp(-|x_i - x_j|^2 / (2 (bandwidth * rms)^2)), rms being the
            root mean square distance of its features, over all n^2 pairs: sqrt(2 / n) times the size.
        bandwidth: of ``rbf``.
        unit: [R, n, e], features whose size (and rms) is used instead of that of ``x``.

    Returns:
        [R, n, n].
    """
    centered, size = _spread(x)
    centered = _divided(centered, size if unit is None else _spread(unit)[1])
    k = centered @ centered.mT  # [R, n, n]
    if kernel == "rbf":
        square = k.diagonal(dim1=1, dim2=2)  # [R, n]
        # squared, in units of the size
        distance = (square.unsqueeze(2) + square.unsqueeze(1) - 2 * k).clamp(min=0)
        # K - 1: the centering does not see the 1, float32 does
        k = torch.expm1(-distance * (x.shape[1] / (4 * bandwidth**2)))
    k = k - k.mean(1, keepdim=True)
    return k - k.mean(2, keepdim=True)


def alignment(k: Tensor, l: Tensor) -> Tensor:
    """<K, L> / (|K| |L|) of centered kernels [R, n, n]: CKA, [R]; 0 where either norm is 0."""
    return (_divided(k, _norm(k)) * _divided(l, _norm(l))).sum((1, 2))


def frobenius_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|K_s - K_t|^2 / |K_t|^2 of centered kernels [R, n, n] in the teacher's units, [R]; 0 for K_t = 0.

    PaKA names a Frobenius variant without a formula; this one is **ours**. Unlike CKA it tells c X from X:
    (c^2 - 1)^2 with the linear kernel. It has no bound: where the teacher's features are nearly alike, the
    student's must be, too.
    """
    return _divided(student - teacher, _norm(teacher)).square().sum((1, 2))


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram anchoring (DINOv3), [R]: mean squared difference of the cosines of all pairs of patches.

    Args:
        student, teacher: [R, n, d] and [R, n, e], of any norm. A patch of zeros has the cosine 0 with all.
    """
    s, t = (_divided(x, torch.linalg.vector_norm(x, dim=-1, keepdim=True)) for x in (student, teacher))
    return (s @ s.mT - t @ t.mT).square().mean((1, 2))


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """H X [R, n, d], and its norm [R, 1, 1]: 0 where it is only rounding."""
    centered = x - x.mean(1, keepdim=True)
    size = _norm(centered)
    return centered, size.masked_fill(size <= ROUNDING * torch.finfo(x.dtype).eps * _norm(x), 0)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each region, [R, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)


def _divided(x: Tensor, size: Tensor) -> Tensor:
    """x / size; where the size is 0: zeros, without a gradient."""
    nothing = size == 0
    return x.masked_fill(nothing, 0) / size.masked_fill(nothing, 1)
