"""Cross-entropy over many prototypes, without ever holding the [N, K] table of logits.

A head ends in K = 65,536 prototypes, so the logits of one batch are gigabytes, several times over. The cross-entropy needs them
only a few rows at a time: a chunk's teacher distribution, loss and gradient are made together, and the gradient goes at once into
the bottleneck rows and the prototypes. The plain form, with autograd, stands beside it as the reference.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Projection(NamedTuple):
    """Tokens before their prototypes: the logits are ``rows @ prototypes.T`` (cosines, both normalised)."""

    rows: Tensor  # [..., d] bottleneck
    prototypes: Tensor  # [K, d]

    @property
    def logits(self) -> Tensor:
        """All of them, [..., K]: for small sizes and for tests."""
        return self.rows @ self.prototypes.T


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products run: autocast's dtype where that is on, else that of ``x``."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def distribution(teacher: Projection, center: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature) of rows [M, d] with a centre [1, K]: [M, K], at least float32.

    The centre is a running mean of the logits (DINO), or what stands for Sinkhorn-Knopp (:func:`pretrain.losses.sinkhorn_center`).
    """
    with torch.no_grad():
        return _distribution(teacher, center, temperature).clone()


def _distribution(teacher: Projection, center: Tensor, temperature: float) -> Tensor:
    """:func:`distribution`, in a table that the next call takes again."""
    scores = _logits(at_least_float32(teacher.rows) / temperature, teacher.prototypes, "teacher")
    scores.sub_(at_least_float32(center) / temperature)
    return torch.softmax(scores, dim=-1, out=scores if scores.device.type == "cpu" else None)  # row by row: in place is safe there


def _logits(rows: Tensor, prototypes: Tensor, name: str) -> Tensor:
    """rows @ prototypes.T, [M, K], at least float32, in the table of that name; the product runs in autocast's dtype."""
    dtype = product_dtype(rows)
    with torch.autocast(rows.device.type, enabled=False):
        if dtype != rows.dtype:
            return (rows.to(dtype) @ prototypes.to(dtype).T).to(rows.dtype)
        return torch.mm(rows, prototypes.to(dtype).T, out=_table(name, len(rows), len(prototypes), rows))


_TABLES: dict[tuple[str, torch.dtype], Tensor] = {}


def _table(name: str, n_rows: int, width: int, like: Tensor) -> Tensor:
    """Room for [n_rows, width]. On the CPU the next call of that name gets the same: a hundred fresh megabytes take longer to be
    given by the system than to be filled. (CUDA's allocator keeps memory by itself.) One thread may use them at a time.
    """
    assert not torch.is_grad_enabled(), "tables are written over: nothing may remember them"
    if like.device.type != "cpu":
        return like.new_empty(n_rows, width)
    key = name, like.dtype
    if key not in _TABLES or _TABLES[key].numel() < n_rows * width:
        _TABLES.pop(key, None)
        _TABLES[key] = like.new_empty(n_rows * width)
    return _TABLES[key][: n_rows * width].view(n_rows, width)


def cross_entropy_sum(
    student: Projection,
    teacher: Projection,
    center: Tensor,
    pairs: Tensor,
    weights: Tensor,
    temperatures: tuple[float, float],
    n_rows: int,
) -> Tensor:
    """sum_b weights_b sum_rt pairs_rt H(teacher distribution of (t, b), student distribution of (r, b)).

    Args:
        student: rows [R, B, d]: R views (or R = 1) of B samples.
        teacher: rows [T, B, d]; see :func:`distribution`.
        center: [1, K].
        pairs: [R, T], how much each pair of views counts.
        weights: [B].
        temperatures: of the student and of the teacher.
        n_rows: student rows whose K logits exist at a time; 0: the plain form, all at once and with autograd.

    Returns:
        a scalar, at least float32; no gradient goes to the teacher.
    """
    if n_rows == 0:
        return plain_cross_entropy_sum(student, teacher, center, pairs, weights, temperatures)
    total: Tensor = _Chunked.apply(
        student.rows,
        student.prototypes,
        Projection(teacher.rows.detach(), teacher.prototypes.detach()),
        center,
        pairs,
        weights,
        temperatures,
        n_rows,
    )
    return total


def plain_cross_entropy_sum(
    student: Projection,
    teacher: Projection,
    center: Tensor,
    pairs: Tensor,
    weights: Tensor,
    temperatures: tuple[float, float],
) -> Tensor:
    """:func:`cross_entropy_sum` as one would write it down: the reference of the chunked form, in value and in gradient."""
    with torch.no_grad():
        targets = F.softmax((at_least_float32(teacher.logits) - center) / temperatures[1], dim=-1)  # [T, B, K]
    log_p = F.log_softmax(at_least_float32(student.logits) / temperatures[0], dim=-1)  # [R, B, K]
    with torch.autocast(log_p.device.type, enabled=False):
        entropies = -torch.einsum("rt,tbk,rbk->rb", pairs.to(log_p.dtype), targets, log_p)
    return (entropies * weights).sum()


class _Chunked(torch.autograd.Function):
    """:func:`cross_entropy_sum` by chunks of samples; the gradient is made in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        prototypes: Tensor,
        teacher: Projection,
        center: Tensor,
        pairs: Tensor,
        weights: Tensor,
        temperatures: tuple[float, float],
        n_rows: int,
    ) -> Tensor:
        n_views, n_samples, width = rows.shape
        dtype, full = product_dtype(rows), torch.promote_types(rows.dtype, torch.float32)
        scaled = rows.to(full) / temperatures[0]  # logits are already divided by the temperature
        table = prototypes.to(dtype)
        mass = pairs.to(full).sum(1, keepdim=True)  # [R, 1]
        pairs, weights = pairs.to(full) / mass.clamp(min=1e-30), weights.to(full) * mass  # [R, T] with rows summing to 1, [R, B]
        total = torch.zeros((), dtype=full, device=rows.device)
        needs_grad = rows.requires_grad or prototypes.requires_grad
        grad_rows = torch.empty(rows.shape, dtype=full, device=rows.device) if needs_grad else None
        grad_table = torch.empty(prototypes.shape, dtype=full, device=rows.device) if needs_grad else None
        if grad_table is not None and n_samples == 0:
            grad_table.zero_()
        teacher = Projection(teacher.rows, teacher.prototypes.to(product_dtype(rows)))  # once, and not in every chunk
        step = max(n_rows // max(n_views, len(pairs[0])), 1)  # samples a chunk
        for first in range(0, n_samples, step):
            part = slice(first, min(first + step, n_samples))
            p = _distribution(Projection(teacher.rows[:, part].flatten(0, 1), teacher.prototypes), center, temperatures[1])
            targets = _paired(pairs, p.unflatten(0, (len(pairs[0]), -1)))  # [R * b, K]
            z = scaled[:, part].flatten(0, 1)  # [R * b, d]
            weight = weights[:, part].flatten()  # [R * b]
            value, slope = _chunk_loss(_logits(z, table, "student"), targets, temperatures[0])
            total += (value * weight).sum()
            if grad_rows is not None and grad_table is not None:
                by_row = (weight / temperatures[0]).unsqueeze(1)
                slope = slope.to(dtype)
                with torch.autocast(rows.device.type, enabled=False):
                    grad_rows[:, part] = ((slope @ table).to(full) * by_row).unflatten(0, (n_views, -1))
                    weighted = z * weight.unsqueeze(1)
                    if dtype == full:
                        torch.addmm(grad_table, slope.T, weighted, beta=int(first > 0), out=grad_table)
                    elif first == 0:
                        grad_table.copy_(slope.T @ weighted.to(dtype))
                    else:
                        grad_table += slope.T @ weighted.to(dtype)
        ctx.grads, ctx.dtypes = (grad_rows, grad_table), (rows.dtype, prototypes.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the backward pass scales the gradients in place: it can run once"
        (grad_rows, grad_table), ctx.grads = ctx.grads, None
        if grad.device.type != "cpu" or grad != 1:  # elsewhere to look would be to wait
            grad_rows, grad_table = grad_rows.mul_(grad), grad_table.mul_(grad)
        return grad_rows.to(ctx.dtypes[0]), grad_table.to(ctx.dtypes[1]), *[None] * 6


def _paired(pairs: Tensor, distributions: Tensor) -> Tensor:
    """[R, T], [T, b, K] -> what each student row has to predict, [R * b, K]."""
    if pairs.shape == (1, 1):
        return distributions[0]
    with torch.autocast(pairs.device.type, enabled=False):  # targets have to sum to 1
        return torch.einsum("rt,tbk->rbk", pairs, distributions).flatten(0, 1)


def _chunk_loss(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy [m] and its slope [m, K] by the logits.

    Args:
        logits: [m, K] cosines / temperature; used up.
        targets: [m, K], rows summing to 1.
    """
    p = torch.softmax(logits, dim=-1, out=_table("probabilities", logits.shape[0], logits.shape[1], logits))
    # log sum exp without another pass of exponentials: logit - log p, which is the same at every prototype
    if 2 / temperature + math.log(logits.shape[1]) < 80:  # cosines lie in [-1, 1]: no p is too small for float32
        log_sum = logits[:, 0] - p[:, 0].log()
    else:
        log_sum = logits.amax(1) - p.amax(1).log()
    value = log_sum - logits.mul_(targets).sum(1)
    return value, p.sub_(targets)
