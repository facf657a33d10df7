"""K-means: scikit-learn's from the same centers; as good as scikit-learn's from its own; hard cases."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from pretrain.evaluation import clustering as kmeans_module
from pretrain.evaluation.clustering import kmeans, lloyd, nearest_centers, spread_centers


def blobs(n=600, dim=5, n_blobs=7, spread=1.5, seed=0, dtype=torch.float64):
    """Blobs that run into one another, far from 0."""
    g = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(n_blobs, dim, generator=g, dtype=torch.float64) + 50
    rows = centers[torch.randint(n_blobs, (n,), generator=g)] + spread * torch.randn(
        n, dim, generator=g, dtype=torch.float64
    )
    return rows.to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_sklearn(x, centers, max_iterations=100):
    return KMeans(
        len(centers), init=centers.numpy(), n_init=1, algorithm="lloyd", max_iter=max_iterations, tol=0
    ).fit(x.numpy())


@pytest.mark.parametrize("most", [100, 3], ids=["to the end", "cut short"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lloyd_is_sklearns(dtype, most):
    x = blobs(dtype=dtype)
    centers = x[torch.randperm(len(x), generator=generator(3))[:9]]
    ours, theirs = lloyd(x, centers, most), by_sklearn(x, centers, most)
    assert (theirs.n_iter_ == 3) == (most == 3) and theirs.n_iter_ < 100
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    assert np.array_equal(ours.labels.numpy(), theirs.labels_)
    np.testing.assert_allclose(ours.centers.numpy(), theirs.cluster_centers_, rtol=exact)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=10 * exact)


@pytest.mark.parametrize("n_far", [1, 2])
def test_empty_clusters_take_the_farthest_rows_as_sklearns(n_far):
    x = blobs(n_blobs=3)
    x[5], x[80] = x[5] + 40, x[80] - 60
    centers = torch.cat([x[:3], x.new_full((n_far, 5), -1e4)])  # nearest to no row
    ours, theirs = lloyd(x, centers), by_sklearn(x, centers)
    assert np.array_equal(ours.labels.numpy(), theirs.labels_) and len(ours.labels.unique()) == 3 + n_far
    np.testing.assert_allclose(ours.centers.numpy(), theirs.cluster_centers_, rtol=1e-12)


def test_from_its_own_centers_as_good_as_sklearn():
    x = blobs(n=400, n_blobs=12, spread=0.8)
    ours = [kmeans(x, 12, generator(seed), n_restarts=3).inertia for seed in range(12)]
    theirs = [KMeans(12, n_init=3, random_state=seed, tol=0).fit(x.numpy()).inertia_ for seed in range(12)]
    random = [
        min(lloyd(x, x[torch.randperm(400, generator=g)[:12]]).inertia for _ in range(3))
        for g in map(generator, range(12))
    ]
    assert min(ours) == pytest.approx(min(theirs)) and np.mean(ours) < 1.05 * np.mean(theirs)
    assert np.mean(ours) < np.mean(random)  # what k-means++ is for


def test_first_centers_are_far_apart():
    """The second center is one of two drawn in proportion to the squared distance from the first; no row
    is taken twice."""
    x = torch.tensor([[0.0], [1.0], [3.0]])
    pairs = torch.stack([spread_centers(x, 2, generator(seed))[:, 0] for seed in range(2000)])
    of_three = pairs[pairs[:, 0] == 3][
        :, 1
    ]  # 9 : 4; the inertia left is 1 with either, and the first drawn is taken
    assert len(of_three) == pytest.approx(667, abs=80) and (of_three == 3).sum() == 0
    assert (of_three == 0).double().mean() == pytest.approx(9 / 13, abs=0.05)
    assert (pairs[pairs[:, 0] == 0][:, 1] == 3).double().mean() == pytest.approx(
        0.99, abs=0.02
    )  # 1 - (1 / 10) ** 2
    assert spread_centers(x, 3, generator()).unique().tolist() == [0, 1, 3]


def test_the_best_restart_is_kept_and_the_seed_decides():
    x = blobs(n=300, n_blobs=12)
    g = generator(1)
    runs = [kmeans(x, 12, g).inertia for _ in range(5)]
    best = kmeans(x, 12, generator(1), n_restarts=5)
    assert best.inertia == min(runs) < max(runs)
    again = kmeans(x, 12, generator(1), n_restarts=5)
    assert torch.equal(best.centers, again.centers) and torch.equal(best.labels, again.labels)


def test_chunks_change_nothing(monkeypatch):
    x = blobs(dtype=torch.float32)
    whole = kmeans(x, 9, generator(), n_restarts=2)
    monkeypatch.setattr(kmeans_module, "CHUNK", 100)
    parts = kmeans(x, 9, generator(), n_restarts=2)
    assert torch.equal(whole.labels, parts.labels)
    torch.testing.assert_close(whole.centers, parts.centers, rtol=1e-6, atol=0)
    assert parts.inertia == pytest.approx(whole.inertia, rel=1e-9)


def test_memory_is_one_chunk_of_distances(monkeypatch):
    seen, addmm = [], torch.addmm

    def watched(*args, **kwargs):
        out = addmm(*args, **kwargs)
        seen.append(out.numel())
        return out

    monkeypatch.setattr(kmeans_module.torch, "addmm", watched)
    monkeypatch.setattr(kmeans_module, "CHUNK", 1000)
    nearest_centers(blobs(), blobs(n=20))
    assert max(seen) <= 1000 and sum(seen) == 600 * 20


def test_equal_rows():
    """Of fewer different rows than clusters each is a cluster, and the other clusters are empty; nothing
    is NaN."""
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    found = kmeans(x, 4, generator(), n_restarts=2)
    assert (
        found.inertia == 0 and torch.equal(found.centers[found.labels], x) and len(found.labels.unique()) == 2
    )
    same = kmeans(torch.full((6, 3), 0.1), 3, generator())
    assert (
        same.labels.tolist() == [0] * 6
        and same.inertia == pytest.approx(0, abs=1e-12)
        and same.centers.isfinite().all()
    )


@pytest.mark.parametrize("n_clusters", [0, 6])
def test_as_many_clusters_as_rows_at_most(n_clusters):
    with pytest.raises(ValueError, match=f"{n_clusters} clusters of 5 rows"):
        kmeans(torch.rand(5, 2), n_clusters, generator())
    assert kmeans(torch.rand(5, 2), 5, generator()).inertia == pytest.approx(0, abs=1e-12)


def test_it_can_be_stopped_after_each_center_and_each_iteration():
    x, ticks = blobs(), []
    spread_centers(x, 9, generator(), lambda: ticks.append("center"))
    lloyd(x, x[:9], 3, tick=lambda: ticks.append("iteration"))
    assert ticks == ["center"] * 8 + ["iteration"] * 3
    kmeans(x, 9, generator(), 2, 1, tick=lambda: ticks.append("both"))
    assert ticks[11:] == ["both"] * 2 * (8 + 1)
