"""Clustering of patches, end to end: scikit-learn's scaler, PCA and K-means with SciPy's assignment; what
is refused."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from pretrain.backbones.vit import ViT
from pretrain.data.datasets import LabelSet
from pretrain.errors import Interrupted, UserError
from pretrain.evaluation import clustering as module
from pretrain.evaluation.clustering import ClusteringSettings, clustering, principal
from pretrain.evaluation.features import Features, Moments, frozen
from pretrain.signals import StopSignals

SIDE, PATCH, CLASSES = 64, 8, ("sky", "grass", "cow")
SHADES = np.array(
    [[230, 40, 40], [30, 0, 150], [40, 220, 40], [110, 50, 0], [40, 60, 240], [240, 230, 60]]
)  # two of each class
SMALL = ClusteringSettings(image_px=SIDE, label_px=40, pca_dim=6, overclusters=(6,), seeds=2, restarts=6)


def write_set(folder, n=12, seed=0):
    """Images of colored squares of two patches; labels of their colors with every fifth one wrong and some
    of 0."""
    rng, files = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        shades = rng.integers(0, 6, (4, 4))
        pixels = SHADES[shades].repeat(2, 0).repeat(2, 1) + rng.integers(-25, 26, (8, 8, 3))
        labels = (
            np.where(rng.random((4, 4)) < 0.2, rng.integers(0, 4, (4, 4)), shades // 2 + 1)
            .repeat(16, 0)
            .repeat(16, 1)
        )
        pair = folder / f"{i}.png", folder / f"{i}_labels.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)).save(pair[0])
        Image.fromarray(labels.astype(np.uint8)).save(pair[1])
        files.append(pair)
    return LabelSet("squares", "val", CLASSES, files, np.arange(4, dtype=np.int32))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    vit = ViT(embed_dim=12, depth=1, num_heads=2, patch_size=PATCH, pos_encoding="none")
    with frozen(vit):
        yield Features(vit, torch.device("cpu"), nullcontext())


def all_of(features, val, label_px):
    images, labels = (torch.cat(parts) for parts in zip(*val.squares(SIDE, label_px, 5)))
    return torch.cat([tokens.patches for tokens in features(images)]).flatten(
        0, 1
    ).double().numpy(), labels.numpy()


def restated(features, val, k, pca_dim=6, label_px=40):
    """Classes of each pixel 1 .. C, and mIoU, by other libraries."""
    x, labels = all_of(features, val, label_px)
    projected = PCA(min(pca_dim, x.shape[1])).fit_transform(StandardScaler().fit_transform(x))
    patches = KMeans(k, n_init=20, random_state=0).fit(projected).labels_.reshape(len(val), SIDE // PATCH, -1)
    at = ((np.arange(label_px) + 0.5) * patches.shape[1] / label_px).astype(int)
    clusters = patches[:, at[:, None], at]
    counted = labels > 0
    ious = np.zeros((k, 3))
    precision = np.zeros((k, 3))
    for a in range(k):
        for c in range(3):
            both = ((clusters == a) & (labels == c + 1)).sum()
            ious[a, c] = both / ((clusters == a) & counted | (labels == c + 1)).sum()
            precision[a, c] = both / ((clusters == a) & counted).sum()
    named = linear_sum_assignment(-ious)[1] if k == 3 else precision.argmax(1)
    classes = named[clusters] + 1
    classwise = [
        ((classes == c) & (labels == c)).sum() / (((classes == c) | (labels == c)) & counted).sum()
        for c in (1, 2, 3)
    ]
    return classes, 100 * np.mean(classwise)


def test_equals_scikit_learn_and_scipy(features, squares):
    outcome = clustering(features, squares, squares, SMALL, n_shown=3)
    classes, expected = restated(features, squares, 3)
    assert outcome.metrics["clustering_miou"] == pytest.approx(expected, abs=1e-9)
    over = restated(features, squares, 6)[1]
    assert outcome.metrics["clustering_k6_miou"] == pytest.approx(over, abs=1e-9)
    assert 30 < expected < over < 90  # nothing is trivial: each shade is a cluster, and three mix the classes
    assert (
        outcome.metrics["clustering_miou_std"]
        == outcome.metrics["clustering_k6_miou_std"]
        == pytest.approx(0)
    )
    assert list(outcome.metrics) == [
        "clustering_miou",
        "clustering_miou_std",
        "clustering_k6_miou",
        "clustering_k6_miou_std",
        "val_classes",
    ]
    assert outcome.maps.keys() == {"clustering"} and len(outcome.maps["clustering"]) == 3
    for i in range(3):
        assert outcome.maps["clustering"][i].dtype == np.int32 and np.array_equal(
            outcome.maps["clustering"][i], classes[i]
        )


def test_unlabeled_pixels_are_not_counted(features, squares, tmp_path):
    """The same images with more labels missing: the numbers are those of the pixels that are left."""
    files = []
    for i, (image, labels) in enumerate(squares.files):
        kept = np.array(Image.open(labels))
        kept[: 16 * (i % 4)] = 0
        Image.fromarray(kept).save(tmp_path / f"{i}.png")
        files.append((image, tmp_path / f"{i}.png"))
    fewer = LabelSet("squares", "val", CLASSES, files, squares.table)
    found = clustering(features, fewer, fewer, SMALL).metrics["clustering_miou"]
    assert found == pytest.approx(restated(features, fewer, 3)[1], abs=1e-9)
    assert found != pytest.approx(restated(features, squares, 3)[1], abs=1e-3)


def test_principal_components_are_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 7)) @ rng.normal(size=(7, 7)) + 30
    x[:, 3] = 5.0  # constant
    moments = Moments(7, 0, torch.device("cpu"))
    for part in torch.from_numpy(x).split(64):
        moments.add(part, part.new_zeros(len(part), 0))
    found = principal(moments, 4)(torch.from_numpy(x)).numpy()[:, ::-1]
    expected = PCA(4).fit_transform(StandardScaler().fit_transform(x))
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-7)
    weight = principal(moments, 50).weight
    assert (
        weight.shape == (7, 7) and not weight[:, 0].any() and weight[:, 1:].any(0).all()
    )  # what does not vary gives 0


def test_seeds_and_pool(features, squares):
    """Few patches, drawn anew for each seed: the numbers differ between seeds, repeat themselves, and have
    a deviation."""
    few = ClusteringSettings(
        image_px=SIDE,
        label_px=40,
        overclusters=(5,),
        seeds=3,
        restarts=1,
        patches_per_cluster=1,
        max_patches=60,
    )
    first, again = (clustering(features, squares, squares, few).metrics for _ in range(2))
    assert first == again and first["clustering_k5_miou_std"] > 0
    single = [
        clustering(
            features,
            squares,
            squares,
            ClusteringSettings(**{**vars(few), "seeds": 1, "seed": seed, "max_patches": 10**6}),
        ).metrics
        for seed in (0, 1)
    ]
    assert (
        single[0].keys() == {"clustering_miou", "clustering_k5_miou", "val_classes"}
        and single[0] != single[1]
    )


def test_the_pool_is_drawn_from_all_patches(features, squares):
    all_patches, _ = all_of(features, squares, 4)
    settings = ClusteringSettings(image_px=SIDE, label_px=4, pca_dim=99, max_patches=50)
    project, pool = module._pool(features, squares, settings, None)
    distances = torch.cdist(pool.double(), project(torch.from_numpy(all_patches)))
    rows = distances.argmin(1)
    assert pool.shape == (50, 12) and distances.min(1).values.max() < 1e-5
    assert len(rows.unique()) == 50 and (rows.diff() > 0).all() and rows[0] < 64 and rows[-1] > 11 * 64


def test_equal_features_are_one_cluster(features, squares):
    """Whichever class the one cluster stands for has its share as IoU, and the others have none."""
    with torch.no_grad():
        weight = features.backbone.norm.weight.clone()
        features.backbone.norm.weight.zero_()
        try:
            outcome = clustering(features, squares, squares, SMALL, n_shown=1)
        finally:
            features.backbone.norm.weight.copy_(weight)
    labels = all_of(features, squares, 40)[1]
    shares = np.bincount(labels[labels > 0])[1:] / (labels > 0).sum()
    assert outcome.metrics["clustering_miou"] == pytest.approx(100 * shares.max() / 3)
    assert outcome.metrics["clustering_k6_miou"] == pytest.approx(100 * shares.max() / 3)
    assert len(np.unique(outcome.maps["clustering"][0])) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_px": 60}, "image_px=60 is no multiple of the patch size 8"),
        ({"overclusters": (769,)}, "K=769 is more than the 768 patches of squares"),
        ({"overclusters": (30,), "max_patches": 20}, "K=30 is more than the 20 patches of squares"),
        ({"overclusters": (3,)}, "overclusters K=3 is not more than the 3 classes of squares"),
    ],
)
def test_refusals(features, squares, change, message):
    with pytest.raises(UserError, match=message):
        clustering(features, squares, squares, ClusteringSettings(**{**vars(SMALL), **change}))


def test_features_that_are_no_numbers_and_sets_without_labels(features, squares):
    nothing = LabelSet("squares", "val", CLASSES, squares.files, np.zeros(4, dtype=np.int32))
    with pytest.raises(UserError, match="squares: the val part has no labeled pixel"):
        clustering(features, nothing, nothing, SMALL)
    bias = features.backbone.norm.bias
    with torch.no_grad():
        bias[0] = torch.nan
        with pytest.raises(UserError, match="not finite"):
            clustering(features, squares, squares, SMALL)
        bias[0] = 0


def test_a_signal_stops_k_means_and_hours_are_told_before(features, squares, monkeypatch, capsys):
    monkeypatch.setattr(module, "_seconds", lambda pool, n_clusters, settings: 3600.0 * n_clusters)
    clustering(features, squares, squares, SMALL, signals=StopSignals())
    said = capsys.readouterr().out
    assert said.startswith(
        "clustering, K-means: up to about 18.0 h on this device; less by clustering.overclusters, "
    )
    assert "clustering, K-means: 4 of 4 fits" in said
    clustering(features, squares, squares, SMALL)
    assert not capsys.readouterr().out  # a probe

    signals, asked = StopSignals(), []
    real = module.check_signals

    def later(signals, where):
        asked.append(where)
        signals.received = "SIGTERM" if len(asked) == 3 else None
        real(signals, where)

    monkeypatch.setattr(module, "check_signals", later)
    with pytest.raises(Interrupted, match="SIGTERM at clustering, K-means"):
        clustering(features, squares, squares, SMALL, signals=signals)
    assert len(asked) == 3


def test_what_k_means_takes_is_measured(features):
    pool = torch.rand(3000, 6)
    few, many = (module._seconds(pool, 5, ClusteringSettings(restarts=n)) for n in (1, 1000))
    assert 0 < few < 60 < 1000 * many and many > 20 * few
