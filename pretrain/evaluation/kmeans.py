"""K-means: Lloyd's iterations from k-means++ centers, on the CPU or a GPU, the same each time on one machine.

Distances are of the data's dtype, of data moved to mean 0; sums are float64. No step adds by scattering, the
order of which a GPU leaves open. What is held beside the data is one chunk of distances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**22  # distances held at a time (float32: 16 MiB, and 32 as float64 memberships)


@dataclass(frozen=True)
class Clusters:
    """What K-means found.

    Attributes:
        centers: [K, D]; some may be equal where there are fewer different rows than clusters.
        labels: [n] int64, the nearest center of each row.
        inertia: sum of the squared distances to them.
    """

    centers: Tensor
    labels: Tensor
    inertia: float


def nearest_centers(x: Tensor, centers: Tensor, chunk: int = CHUNK) -> Tensor:
    """The nearest of ``centers`` [K, D] for each row of ``x`` [n, D], the first of equals: [n] int64."""
    norms = centers.square().sum(1)  # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 is the same for all c
    return torch.cat(
        [torch.addmm(norms, part, centers.T, alpha=-2).argmin(1) for part in _chunks(x, len(centers), chunk)]
    )


def lloyd(
    x: Tensor,
    centers: Tensor,
    max_iterations: int = 100,
    chunk: int = CHUNK,
    tick: Callable[[], object] = lambda: None,
) -> Clusters:
    """Lloyd's iterations from given centers [K, D], until no row changes its cluster. An empty cluster takes
    the row farthest from its center (as scikit-learn's).

    Args:
        x: [n, D].
        max_iterations: at most.
        chunk: distances held at a time, which bounds the memory.
        tick: called after each iteration; what it raises ends them.
    """
    mean = x.mean(0, dtype=torch.float64).to(x.dtype)
    x, centers = x - mean, centers - mean
    labels = nearest_centers(x, centers, chunk)
    for _ in range(max_iterations):
        before, centers = labels, _means(x, labels, centers, chunk)
        labels = nearest_centers(x, centers, chunk)
        if torch.equal(labels, before):
            break
        tick()
    return Clusters(centers + mean, labels, _distances(x, labels, centers, chunk).sum().item())


def spread_centers(
    x: Tensor, n_clusters: int, generator: torch.Generator, tick: Callable[[], object] = lambda: None
) -> Tensor:
    """k-means++: rows of ``x`` [n, D] drawn one after the other, in proportion to the squared distance to
    those taken before; of 2 + ln K drawn at a time the one is taken that leaves the least inertia (as
    scikit-learn's).

    Args:
        generator: on the CPU.
        tick: called after each center.

    Returns:
        [K, D]; rows are taken twice only where there are fewer different ones.
    """
    n_drawn = 2 + int(math.log(n_clusters))
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = _to_rows(x, chosen)  # [n, 1]
    for _ in range(n_clusters - 1):
        total = nearest[:, 0].cpu().cumsum(0)  # on the CPU: a GPU's scan adds in an order of its own
        at = torch.rand(n_drawn, dtype=torch.float64, generator=generator) * total[-1]
        rows = (
            torch.searchsorted(total, at, right=True).clamp(max=len(x) - 1).tolist()
        )  # all rows equal: the last one
        left = torch.minimum(nearest, _to_rows(x, rows))  # [n, drawn]
        best = int(left.sum(0).argmin())
        chosen.append(rows[best])
        nearest = left[:, best : best + 1]
        tick()
    return x[chosen]


def kmeans(
    x: Tensor,
    n_clusters: int,
    generator: torch.Generator,
    n_restarts: int = 1,
    max_iterations: int = 100,
    chunk: int = CHUNK,
    tick: Callable[[], object] = lambda: None,
) -> Clusters:
    """The best, by inertia, of ``n_restarts`` runs of :func:`lloyd` from :func:`spread_centers`; the
    arguments are theirs.

    Raises:
        ValueError: more clusters than rows.
    """
    if not 1 <= n_clusters <= len(x):
        raise ValueError(f"{n_clusters} clusters of {len(x)} rows")
    firsts = (spread_centers(x, n_clusters, generator, tick) for _ in range(n_restarts))
    return min(
        (lloyd(x, first, max_iterations, chunk, tick) for first in firsts), key=lambda run: run.inertia
    )


def _means(x: Tensor, labels: Tensor, centers: Tensor, chunk: int) -> Tensor:
    """Mean of each cluster's rows; [K, D]."""
    n_clusters = len(centers)
    counts = torch.bincount(labels, minlength=n_clusters)
    sums = centers.new_zeros(centers.shape, dtype=torch.float64)
    for part, own in zip(_chunks(x, n_clusters, chunk), _chunks(labels, n_clusters, chunk)):
        members = own[:, None] == torch.arange(n_clusters, device=x.device)  # [c, K]
        sums += members.double().T @ part.double()
    if (empty := (counts == 0).nonzero().flatten()).numel():
        distances = _distances(x, labels, centers, chunk)
        far = distances.topk(min(len(empty), len(x))).indices
        for cluster, row in zip(empty.tolist(), far[distances[far] > 0].tolist()):
            sums[labels[row]] -= x[row].double()
            counts[labels[row]] -= 1
            sums[cluster], counts[cluster] = x[row].double(), 1
    means = (sums / counts.clamp(min=1)[:, None]).to(x.dtype)
    return torch.where(counts[:, None] > 0, means, centers)


def _distances(x: Tensor, labels: Tensor, centers: Tensor, chunk: int) -> Tensor:
    """Squared distance of each row to the center of its cluster; [n] float64."""
    parts = zip(_chunks(x, x.shape[1], chunk), _chunks(labels, x.shape[1], chunk))
    return torch.cat([(part.double() - centers[own].double()).square().sum(1) for part, own in parts])


def _to_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Squared distance of each row of ``x`` to some of its rows, 0 of equal ones; [n, rows] float64."""
    return torch.cdist(x, x[rows], compute_mode="donot_use_mm_for_euclid_dist").double().square()


def _chunks(x: Tensor, width: int, chunk: int) -> tuple[Tensor, ...]:
    """Rows of ``x``, as many at a time as make ``chunk`` values of ``width``."""
    return x.split(max(1, chunk // width))
