"""Cross-entropy between two heads over many prototypes, without ever holding the [N, K] table of logits.

A head ends in K = 65,536 prototypes, so the logits of one batch take gigabytes, several times over. The
cross-entropy needs only a few rows at a time: each chunk's logits, loss and gradient are computed together,
and the gradient is reduced at once to those of the bottleneck and the prototypes. The plain form, with
autograd, is the reference.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import cpu_tuning
from pretrain.heads import HeadOutput
from pretrain.precision import at_least_float32, logits_dtype, product_dtype


def cross_entropy_sum(
    student: HeadOutput,
    teacher: HeadOutput,
    center: Tensor,
    pairs: Tensor,
    weights: Tensor,
    temperatures: tuple[float, float],
    n_rows: int,
) -> Tensor:
    """sum_b weights_b sum_rt pairs_rt H(teacher distribution of (t, b), student distribution of (r, b)).

    Args:
        student: bottleneck [R, B, d]: R views (or R = 1) of B samples.
        teacher: bottleneck [T, B, d]; see :func:`distribution`. It gets no gradient.
        center: [1, K], of the teacher's logits.
        pairs: [R, T], how much each pair of views counts.
        weights: [B].
        temperatures: of the student and of the teacher.
        n_rows: student rows whose K logits exist at a time; 0: the plain form, all at once and with autograd.

    Returns:
        a scalar, at least float32. The chunked form can be differentiated once.
    """
    if n_rows == 0:
        return plain_cross_entropy_sum(student, teacher, center, pairs, weights, temperatures)
    teacher = HeadOutput(teacher.bottleneck.detach(), teacher.prototypes.detach())
    total: Tensor = _Chunked.apply(*student, teacher, center, pairs, weights, temperatures, n_rows)
    return total


def plain_cross_entropy_sum(
    student: HeadOutput,
    teacher: HeadOutput,
    center: Tensor,
    pairs: Tensor,
    weights: Tensor,
    temperatures: tuple[float, float],
) -> Tensor:
    """:func:`cross_entropy_sum` as the paper writes it, with autograd: the reference of the chunked form."""
    with torch.no_grad():
        scores = (at_least_float32(teacher.logits) - center) / temperatures[1]
        targets = F.softmax(scores, dim=-1)  # [T, B, K]
    log_p = F.log_softmax(at_least_float32(student.logits) / temperatures[0], dim=-1)  # [R, B, K]
    with torch.autocast(log_p.device.type, enabled=False):
        entropies = -torch.einsum("rt,tbk,rbk->rb", pairs.to(log_p.dtype), targets, log_p)
    return (entropies * weights).sum()


@torch.no_grad()
def distribution(teacher: HeadOutput, center: Tensor, temperature: float, table: str = "") -> Tensor:
    """softmax((logits - center) / temperature), [M, K], at least float32.

    Args:
        teacher: bottleneck [M, d].
        center: [1, K], see :mod:`pretrain.losses.centering`.
        temperature: of the teacher.
        table: see :func:`_logits`.
    """
    scores = _logits(at_least_float32(teacher.bottleneck) / temperature, teacher.prototypes, table)
    return cpu_tuning.softmax_(scores.sub_(at_least_float32(center) / temperature))


def _logits(rows: Tensor, prototypes: Tensor, table: str = "") -> Tensor:
    """rows @ prototypes.T, [M, K], in the dtype of ``rows``; the product runs in :func:`logits_dtype`. Cosines over
    a temperature of at least 1e-4 are far below float16's largest number, 65,504.

    With a ``table`` (:mod:`pretrain.cpu_tuning`) the result is valid until the next call with that name.
    """
    dtype = logits_dtype(rows)
    with torch.autocast(rows.device.type, enabled=False):
        if dtype == rows.dtype and table:
            return cpu_tuning.product(rows, prototypes.to(dtype), table)
        return (rows.to(dtype) @ prototypes.to(dtype).T).to(rows.dtype)


class _Chunked(torch.autograd.Function):
    """:func:`cross_entropy_sum` in chunks of samples; its forward pass makes the gradients, too."""

    @staticmethod
    def forward(ctx: Any, bottleneck: Tensor, prototypes: Tensor, *args: Any) -> Tensor:
        total, *ctx.grads = _value_and_gradients(HeadOutput(bottleneck, prototypes), *args)
        ctx.dtypes = bottleneck.dtype, prototypes.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the backward pass scales the gradients in place: it can run once"
        grads, ctx.grads = ctx.grads, None
        cpu_tuning.scale_(grads, grad)
        return grads[0].to(ctx.dtypes[0]), grads[1].to(ctx.dtypes[1]), *[None] * 6


def _value_and_gradients(
    student: HeadOutput,
    teacher: HeadOutput,
    center: Tensor,
    pairs: Tensor,
    weights: Tensor,
    temperatures: tuple[float, float],
    n_rows: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, and its gradients by the student's bottleneck and prototypes where either needs one."""
    bottleneck, (n_views, n_samples, _) = student.bottleneck, student.bottleneck.shape
    dtype, full = product_dtype(bottleneck), torch.promote_types(bottleneck.dtype, torch.float32)
    z = bottleneck.to(full) / temperatures[0]  # [R, B, d], so that z @ prototypes.T are logits / temperature
    # Cast once, not in every chunk. Gradients stay in autocast's dtype: weights of a patch are 1e-5, which float16
    # rounds to a few of its smallest numbers.
    prototypes = student.prototypes.to(dtype)
    of_logits = student.prototypes.to(logits_dtype(bottleneck))
    teacher = HeadOutput(teacher.bottleneck, teacher.prototypes.to(of_logits.dtype))
    mass = pairs.to(full).sum(1, keepdim=True)  # [R, 1]
    pairs = pairs.to(full) / mass.clamp(min=1e-30)  # [R, T], rows summing to 1
    weights = weights.to(full) * mass  # [R, B]
    total = torch.zeros((), dtype=full, device=z.device)
    grad_z = grad_prototypes = None
    if bottleneck.requires_grad or student.prototypes.requires_grad:
        grad_z = z.new_empty(z.shape)
        grad_prototypes = (z.new_empty if n_samples else z.new_zeros)(prototypes.shape)
    n_teachers = len(teacher.bottleneck)
    step = max(n_rows // max(n_views, n_teachers), 1)  # samples a chunk
    for first in range(0, n_samples, step):
        chunk = slice(first, min(first + step, n_samples))  # b samples
        rows = HeadOutput(teacher.bottleneck[:, chunk].flatten(0, 1), teacher.prototypes)
        p = distribution(rows, center, temperatures[1], "teacher").unflatten(0, (n_teachers, -1))  # [T, b, K]
        targets = _mixed(pairs, p)  # [R * b, K]
        z_chunk, weight = z[:, chunk].flatten(0, 1), weights[:, chunk].flatten()  # [R * b, d], [R * b]
        value, slope = _chunk_loss(_logits(z_chunk, of_logits, "student"), targets, temperatures[0])
        total += (value * weight).sum()
        if grad_z is not None and grad_prototypes is not None:
            slope = slope.to(dtype)
            with torch.autocast(z.device.type, enabled=False):
                by_row = (weight / temperatures[0]).unsqueeze(1)
                grad_z[:, chunk] = ((slope @ prototypes).to(full) * by_row).unflatten(0, (n_views, -1))
                _add_product(grad_prototypes, slope, z_chunk * weight.unsqueeze(1), is_first=first == 0)
    return total, grad_z, grad_prototypes


def _mixed(pairs: Tensor, p: Tensor) -> Tensor:
    """What each student row has to predict: sum_t pairs_rt p_tbk, [R, T] and [T, b, K] -> [R * b, K]."""
    if pairs.shape == (1, 1):
        return p[0]
    with torch.autocast(pairs.device.type, enabled=False):  # targets have to sum to 1
        return torch.einsum("rt,tbk->rbk", pairs, p).flatten(0, 1)


def _chunk_loss(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy [m], log sum exp(logits) - <targets, logits>, and its slope [m, K], p - targets.

    Args:
        logits: [m, K] cosines / temperature; overwritten.
        targets: [m, K], rows summing to 1.
        temperature: of the student.
    """
    p = cpu_tuning.softmax(logits, "probabilities")
    # log sum exp without another pass of exponentials: logit - log p, which is the same at every prototype.
    # Cosines lie in [-1, 1]: below 80 no p is too small for float32.
    if 2 / temperature + math.log(logits.shape[1]) < 80:
        log_sum = logits[:, 0] - p[:, 0].log()
    else:
        log_sum = logits.amax(1) - p.amax(1).log()
    value = log_sum - logits.mul_(targets).sum(1)
    return value, p.sub_(targets)


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a.T @ b in the dtype of ``a``; the first time ``total`` is written, not read."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b, beta=int(not is_first))
    elif is_first:
        total.copy_(a.T @ b.to(a.dtype))
    else:
        total += a.T @ b.to(a.dtype)
