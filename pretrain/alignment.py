"""How alike two sets of patch features are: the losses of dense post-training, pure functions of features alone.

* CKA, centred kernel alignment (Kornblith et al., 2019), PaKA's: the geometry of a region's patches in student and teacher.
* Gram anchoring (DINOv3): the mean squared difference of the cosines between all patches.

A region's features are [n, d]; regions come stacked, [R, n, d], and every Gram matrix is of one region. All is computed in float32
(float64 stays float64), autocast or not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("cka", "frobenius", "gram")
KERNELS = ("linear", "rbf")
EPS = 1e-6  # of a region's own size: what is smaller is rounding


def alignment_loss(name: str, student: Tensor, teacher: Tensor, kernel: str = "linear", bandwidth: float = 1.0) -> Tensor:
    """The loss of each region, [R]; 0 where the regions agree.

    Args:
        name: ``cka`` | ``frobenius`` | ``gram``.
        student, teacher: [R, n, d] and [R, n, e], the same places in the same order. The gradient goes to both.
        kernel, bandwidth: of ``cka`` and ``frobenius``, see :func:`centred_kernel`.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = _full(student), _full(teacher)
        if name == "gram":
            return gram_distance(s, t)
        kernels = centred_kernel(s, kernel, bandwidth), centred_kernel(t, kernel, bandwidth)
        return 1 - alignment(*kernels) if name == "cka" else frobenius_distance(*kernels)


def centred_kernel(x: Tensor, kernel: str = "linear", bandwidth: float = 1.0) -> Tensor:
    """H K H of the features of each region, K being their kernel and H = 1 - 1/n.

    Features are centred and scaled to norm 1 first, which CKA does not see and float32 needs. The guard against dividing by
    nothing is relative to the features' own norm, so nothing depends on their scale (an absolute one would count small features
    as none); features that are all alike give a kernel of zeros.

    Args:
        x: [R, n, d].
        kernel: ``linear``: <x_i, x_j> | ``rbf``: exp(-|x_i - x_j|^2 / (2 (bandwidth * rms)^2)), rms the root mean square
            distance between two of the region's features.

    Returns:
        [R, n, n].
    """
    spread = x - x.mean(1, keepdim=True)  # H x
    size = torch.maximum(_norm(spread), EPS * _norm(x))  # relative: a region of one feature only has rounding for a spread
    unit = spread / size.where(size > 0, torch.ones_like(size))
    k = unit @ unit.mT  # [R, n, n]
    if kernel == "rbf":
        square = k.diagonal(dim1=1, dim2=2)  # [R, n]
        distance = (square.unsqueeze(2) + square.unsqueeze(1) - 2 * k).clamp(min=0)  # squared
        mean = distance.mean((1, 2), keepdim=True)
        k = (-distance / (2 * bandwidth**2 * mean.where(mean > 0, torch.ones_like(mean)))).exp()
    k = k - k.mean(1, keepdim=True)
    return k - k.mean(2, keepdim=True)


def alignment(k: Tensor, l: Tensor) -> Tensor:
    """<K, L> / (|K| |L|) of centred kernels [R, n, n]: CKA, [R], 0 where one of them is nothing."""
    return (_unit(k) * _unit(l)).sum((1, 2))


def frobenius_distance(k: Tensor, l: Tensor) -> Tensor:
    """PaKA's Frobenius variant (ours in detail), [R]."""
    return (_unit(k) - _unit(l)).square().sum((1, 2)).clamp(min=EPS**2).sqrt()


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram anchoring (DINOv3): the mean over all pairs of patches of the squared difference of their cosines, [R]."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (s @ s.mT - t @ t.mT).square().mean((1, 2))


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each region, [R, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)


def _unit(k: Tensor) -> Tensor:
    """Kernels of norm 1; that of features which are all alike stays near 0."""
    return k / _norm(k).clamp(min=1e-3)  # of unit features: 1 / sqrt(n) at least, unless they are only rounding


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
