"""Unsupervised segmentation: K-means of the validation part's patches, each cluster then named after a class.

The protocol is that of Leopart's fully unsupervised segmentation and overclustering, as NeCo's public code
has it (eval_overcluster.py and experiments/utils.py there). Its features are standardized, reduced by PCA,
clustered by faiss, whose defaults it keeps. **Ours**: the centers start from k-means++ (faiss: random rows);
all seeds draw from one pool of patches; each label pixel takes the patch that its center lies in (theirs: its
upper left corner); a class that does not occur is left out of the mean, and label 0 (ADE20K's "other") is no
class, where theirs counts 151 with one IoU that is always 0.

K-means gives the same each time on one machine: distances are of the data's dtype, of data moved to mean 0,
sums are float64, and no step adds by scattering, the order of which a GPU leaves open.
"""

import math
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Generator, Tensor

from pretrain.data.datasets import LabelSet
from pretrain.errors import UserError
from pretrain.evaluation import Outcome, Tick, check_signals, steps, tell_if_long
from pretrain.evaluation.features import (
    FORWARD_BATCH,
    Features,
    Moments,
    ReadOut,
    check_varied,
    finite,
)
from pretrain.evaluation.miou import count_pairs, greedy, hungarian, mean_iou, n_present
from pretrain.settings import Settings, setting
from pretrain.signals import StopSignals

PROJECTED_AT_ONCE = 2**13  # patches of the pool, in float64
TIMED = 2**12  # patches
CHUNK = 2**22  # distances held at a time (float32: 16 MiB, and 32 as float64 memberships)


class ClusteringSettings(Settings):
    """The protocol."""

    image_px: int = setting(448, "side of an image", source="Leopart, NeCo: size_crops", ge=1)
    label_px: int = setting(
        100, "side at which clusters and labels meet", source="Leopart, NeCo: mask_eval_size", ge=1
    )
    pca_dim: int = setting(
        50, "components; of no more features all, standardized alone", source="Leopart, NeCo: pca_dim", ge=1
    )
    overclusters: tuple[PositiveInt, ...] = setting(
        (500,), "K beside the number of classes", source="Leopart's configs, NeCo's table"
    )
    seeds: int = setting(5, "over which figures are averaged", source="Leopart, NeCo: num_seeds", ge=1)
    restarts: int = setting(5, "of K-means, the best counts", source="Leopart, NeCo: nredo", ge=1)
    max_iterations: int = setting(100, "of K-means", source="Leopart, NeCo: niter", ge=1)
    patches_per_cluster: int = setting(
        256, "that K-means sees", source="faiss's default: max_points_per_centroid", ge=1
    )
    max_patches: int = setting(
        2**17, "the pool they are drawn from; 256 for each of 500 clusters are 128,000", source="ours", ge=1
    )
    seed: int = setting(0, "the first of the seeds", source="Leopart, NeCo", ge=0)


def clustering(
    features: Features,
    train: LabelSet,
    val: LabelSet,
    settings: ClusteringSettings,
    n_shown: int = 0,
    signals: StopSignals | None = None,
) -> Outcome:
    """An evaluator: mIoU of clusters matched to classes: one to one for K = classes, many to one above.

    Two passes over the images, the labels of which serve the matching alone; ``train`` is not used. Memory:
    the pool, max_patches x D float32 (201 MB for D = 384, 537 MB for 1024) on the CPU, then its projection,
    max_patches x pca_dim (26 MB), on the device; the patches of one batch; one chunk of distances. With the
    set grow 8 bytes a patch, for drawing the pool. Features that are all equal are one cluster: the others
    are empty.

    Returns:
        ``clustering_miou``, ``clustering_k{K}_miou`` and, of several seeds, their sample deviations
        ``..._std``; maps ``clustering`` of the first seed, [label_px, label_px]: the classes 1 .. C that the
        clusters were matched to.

    Raises:
        UserError: more clusters than patches, an overcluster number that is not above the number of classes,
            an image size that is not whole patches.
        Interrupted: there was a signal, which K-means looks at after each iteration.
    """
    n_classes = len(val.classes)
    numbers = (n_classes, *settings.overclusters)
    _check(features, val, settings, numbers)
    project, pool = _pool(features, val, settings, signals)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    centers = _centers(pool, [(n, seed) for n in numbers for seed in seeds], settings, signals)
    counts = {key: torch.zeros(key[0], n_classes, dtype=torch.int64, device=pool.device) for key in centers}
    shown: list[Tensor] = []
    for images, labels in val.squares(settings.image_px, settings.label_px, FORWARD_BATCH):
        projected = torch.cat([project(tokens.patches) for tokens in features(images)]).float()  # [b, N, d]
        labels = labels.to(pool.device)
        for key, own in centers.items():
            of_patches = nearest_centers(projected.flatten(0, 1), own).view(projected.shape[:2])
            clusters = _at_pixels(of_patches, settings.label_px)
            counts[key] += count_pairs(clusters, labels, key[0], n_classes)
            if key == (n_classes, seeds[0]) and len(shown) < n_shown:
                shown += clusters[: n_shown - len(shown)]
    if not counts[n_classes, seeds[0]].any():
        raise UserError(f"{val.name}: the {val.part} part has no labeled pixel")
    metrics: dict[str, Any] = {}
    for n in numbers:
        match, name = (hungarian, "clustering") if n == n_classes else (greedy, f"clustering_k{n}")
        scores = [mean_iou(counts[n, seed], match(counts[n, seed])) for seed in seeds]
        metrics[f"{name}_miou"] = statistics.fmean(scores)
        if len(seeds) > 1:
            metrics[f"{name}_miou_std"] = statistics.stdev(scores)
    metrics["val_classes"] = n_present(counts[n_classes, seeds[0]])
    matched = hungarian(counts[n_classes, seeds[0]])
    maps = [(matched[clusters] + 1).cpu().numpy().astype(np.int32) for clusters in shown]
    return Outcome(metrics, {"clustering": maps})


def _check(features: Features, val: LabelSet, settings: ClusteringSettings, numbers: tuple[int, ...]) -> None:
    patch_px = features.backbone.patch_size
    side_px, n_classes = settings.image_px, len(val.classes)
    if side_px % patch_px:
        raise UserError(f"clustering: image_px={side_px} is no multiple of the patch size {patch_px}")
    n_patches = min(len(val) * (side_px // patch_px) ** 2, settings.max_patches)
    if (n := max(numbers)) > n_patches:
        raise UserError(f"clustering: K={n} is more than the {n_patches} patches of {val.name} to cluster")
    if few := [n for n in numbers[1:] if n <= n_classes]:
        what = f"overclusters K={min(few)} is not more than the {n_classes} classes of {val.name}"
        raise UserError(f"clustering: {what}")


def _pool(
    features: Features, val: LabelSet, settings: ClusteringSettings, signals: StopSignals | None
) -> tuple[ReadOut, Tensor]:
    """The projection [D] -> [d], and the pool projected, [M, d] float32: patches drawn at random, all
    where there are no more."""
    backbone = features.backbone
    n_patches = len(val) * (settings.image_px // backbone.patch_size) ** 2
    drawn = torch.randperm(n_patches, generator=_generator(0, settings.seed))
    drawn = drawn[: settings.max_patches].sort().values
    moments, seen = Moments(backbone.embed_dim, 0, features.device), 0
    pool = torch.empty(len(drawn), backbone.embed_dim)
    for images, _ in val.squares(settings.image_px, settings.label_px, FORWARD_BATCH):
        for tokens in features(images):
            patches = tokens.patches.flatten(0, 1)
            moments.add(patches, patches.new_zeros(len(patches), 0))
            first, end = torch.searchsorted(drawn, torch.tensor([seen, seen + len(patches)])).tolist()
            pool[first:end] = patches[(drawn[first:end] - seen).to(patches.device)].cpu()
            seen += len(patches)
    assert seen == n_patches, (seen, n_patches)
    finite(moments.xx)
    check_varied(pool, signals)
    project = principal(moments, settings.pca_dim)
    return project, torch.cat([project(part).float() for part in pool.split(PROJECTED_AT_ONCE)])


def principal(moments: Moments, dim: int) -> ReadOut:
    """Standardize features, then keep their first ``dim`` principal components: [D] -> [min(D, dim)]. A
    direction that does not vary gives 0."""
    mean, std, correlation = moments.standard()
    values, vectors = torch.linalg.eigh(correlation)  # ascending
    components = (vectors * (values > 1e-9))[:, -dim:] / std[:, None]
    return ReadOut(components, -mean @ components)


def _centers(
    pool: Tensor, keys: list[tuple[int, int]], settings: ClusteringSettings, signals: StopSignals | None
) -> dict[tuple[int, int], Tensor]:
    """Of each (K, seed): [K, d]."""
    where = "clustering, K-means"
    if signals is not None:
        less_by = "clustering.overclusters, clustering.seeds, clustering.restarts"
        tell_if_long(where, sum(_seconds(pool, n, settings) for n, _ in keys), less_by)
    tell = steps(where, len(keys), signals, "fits")
    found = {}
    for n, seed in keys:
        generator = _generator(n, seed)  # draws the part of the pool that is clustered, too
        rows = torch.randperm(len(pool), generator=generator)[: settings.patches_per_cluster * n]
        x, tick = pool[rows.sort().values.to(pool.device)], partial(check_signals, signals, where)
        best = kmeans(x, n, generator, settings.restarts, settings.max_iterations, tick=tick)
        found[n, seed] = best.centers
        tell()
    return found


def _seconds(pool: Tensor, n_clusters: int, settings: ClusteringSettings) -> float:
    """About how long K-means takes if no restart converges, from the distances of some patches."""
    n_patches = min(len(pool), settings.patches_per_cluster * n_clusters)
    some = pool[: min(n_patches, TIMED)]
    started = time.perf_counter()
    nearest_centers(some, pool[:n_clusters])[-1].item()
    seconds = (time.perf_counter() - started) * n_patches / len(some)
    # On one core, at K = 500, the means took 1.4 times as long as the distances; k-means++ about 0.35 times
    # as long as 100 of them.
    return 2.75 * seconds * settings.max_iterations * settings.restarts


def _generator(n_clusters: int, seed: int) -> Generator:
    """The pool's is that of no cluster."""
    return Generator().manual_seed(n_clusters * 1_000_003 + seed)


def _at_pixels(patches: Tensor, side_px: int) -> Tensor:
    """Of a square patch grid [b, N] to [b, side, side]: the patch that each pixel's center lies in."""
    grid = round(patches.shape[1] ** 0.5)
    at = ((torch.arange(side_px, device=patches.device) + 0.5) * grid / side_px).long()
    return patches.unflatten(1, (grid, grid))[:, at[:, None], at]


class Clusters(NamedTuple):
    """What K-means found."""

    centers: Tensor  # [K, D], some of them equal where there are fewer different rows than clusters
    labels: Tensor  # of each row, the nearest: [n] int64
    inertia: float  # sum of the squared distances to them


def nearest_centers(x: Tensor, centers: Tensor) -> Tensor:
    """The nearest of ``centers`` [K, D] for each row of ``x`` [n, D], the first of equals: [n] int64."""
    norms = centers.square().sum(1)  # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 is the same for all c
    parts = _chunks(x, len(centers))
    return torch.cat([torch.addmm(norms, part, centers.T, alpha=-2).argmin(1) for part in parts])


def lloyd(x: Tensor, centers: Tensor, max_iterations: int = 100, tick: Tick = lambda: None) -> Clusters:
    """Lloyd's iterations of ``x`` [n, D] from given centers [K, D], until no row changes its cluster. An empty
    cluster takes the row farthest from its center (as scikit-learn's). ``tick`` is called after each
    iteration; what it raises ends them."""
    mean = x.mean(0, dtype=torch.float64).to(x.dtype)
    x, centers = x - mean, centers - mean
    labels = nearest_centers(x, centers)
    for _ in range(max_iterations):
        before, centers = labels, _means(x, labels, centers)
        labels = nearest_centers(x, centers)
        if torch.equal(labels, before):
            break
        tick()
    return Clusters(centers + mean, labels, _distances(x, labels, centers).sum().item())


def spread_centers(x: Tensor, n_clusters: int, generator: Generator, tick: Tick = lambda: None) -> Tensor:
    """k-means++: rows of ``x`` [n, D] drawn one after the other, in proportion to the squared distance to
    those taken before; of 2 + ln K drawn at a time the one is taken that leaves the least inertia (as
    scikit-learn's). [K, D]; rows are taken twice only where there are fewer different ones. The generator is
    on the CPU; ``tick`` is called after each center."""
    n_drawn = 2 + int(math.log(n_clusters))
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = _to_rows(x, chosen)  # [n, 1]
    for _ in range(n_clusters - 1):
        total = nearest[:, 0].cpu().cumsum(0)  # on the CPU: a GPU's scan adds in an order of its own
        at = torch.rand(n_drawn, dtype=torch.float64, generator=generator) * total[-1]
        # Of rows that are all equal the last one
        rows = torch.searchsorted(total, at, right=True).clamp(max=len(x) - 1).tolist()
        left = torch.minimum(nearest, _to_rows(x, rows))  # [n, drawn]
        best = int(left.sum(0).argmin())
        chosen.append(rows[best])
        nearest = left[:, best : best + 1]
        tick()
    return x[chosen]


def kmeans(
    x: Tensor,
    n_clusters: int,
    generator: Generator,
    n_restarts: int = 1,
    most: int = 100,
    tick: Tick = lambda: None,
) -> Clusters:
    """The best, by inertia, of ``n_restarts`` runs of :func:`lloyd` from :func:`spread_centers`; the
    arguments are theirs. A ValueError for more clusters than rows."""
    if not 1 <= n_clusters <= len(x):
        raise ValueError(f"{n_clusters} clusters of {len(x)} rows")
    firsts = (spread_centers(x, n_clusters, generator, tick) for _ in range(n_restarts))
    runs = (lloyd(x, first, most, tick) for first in firsts)
    return min(runs, key=lambda run: run.inertia)


def _means(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    n_clusters = len(centers)
    counts = torch.bincount(labels, minlength=n_clusters)
    sums = centers.new_zeros(centers.shape, dtype=torch.float64)
    for part, own in zip(_chunks(x, n_clusters), _chunks(labels, n_clusters)):
        members = own[:, None] == torch.arange(n_clusters, device=x.device)  # [c, K]
        sums += members.double().T @ part.double()
    if (empty := (counts == 0).nonzero().flatten()).numel():
        distances = _distances(x, labels, centers)
        far = distances.topk(min(len(empty), len(x))).indices
        for cluster, row in zip(empty.tolist(), far[distances[far] > 0].tolist()):
            sums[labels[row]] -= x[row].double()
            counts[labels[row]] -= 1
            sums[cluster], counts[cluster] = x[row].double(), 1
    means = (sums / counts.clamp(min=1)[:, None]).to(x.dtype)
    return torch.where(counts[:, None] > 0, means, centers)


def _distances(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Squared distance of each row to the center of its cluster; [n] float64."""
    parts = zip(_chunks(x, x.shape[1]), _chunks(labels, x.shape[1]))
    return torch.cat([(part.double() - centers[own].double()).square().sum(1) for part, own in parts])


def _to_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Squared distance of each row of ``x`` to some of its rows, 0 of equal ones; [n, rows] float64."""
    return torch.cdist(x, x[rows], compute_mode="donot_use_mm_for_euclid_dist").double().square()


def _chunks(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """Rows of ``x``, as many at a time as make ``CHUNK`` values of ``width``."""
    return x.split(max(1, CHUNK // width))
