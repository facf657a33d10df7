"""In-context segmentation: a brute-force restatement in float64; what is held in memory; ties, small
memories, seeds."""

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as T
from ade_fixture import write_ade
from test_dense_linear import CPU, PATCH, SIDE, Colors, blocks_set, features_of, held, random_set, tiny_vit
from test_dense_linear import WHOLE as WHOLE_LINEAR

from pretrain.data.datasets import MaskRule, open_label_set
from pretrain.errors import Interrupted, UserError
from pretrain.evaluation import check_signals
from pretrain.evaluation import in_context as in_context_module
from pretrain.evaluation.dense import settings_of
from pretrain.evaluation.features import frozen
from pretrain.evaluation.in_context import (
    InContextSettings,
    Memory,
    choose,
    in_context,
    jittered,
    patch_counts,
    remember,
)
from pretrain.evaluation.linear_segmentation import LinearSettings, linear
from pretrain.settings import replaced
from pretrain.signals import StopSignals
from pretrain.views.pixels import normalize

GRID = SIDE // PATCH
WHOLE = InContextSettings(image_px=SIDE, k=5, memory_size=10_000, passes=1, augment=False, map_px=SIDE)


def pixels_of(part):
    return torch.from_numpy(np.stack(part.images)).permute(0, 3, 1, 2)


def ragged_set(n, part):
    """Labels that change within patches; a patch of each image, and some pixels, are not counted."""
    rng = np.random.default_rng([9, part == "val"])
    base = random_set(n, part)
    labels = [
        np.where(rng.random(m.shape) < 0.2, 0, np.roll(m, rng.integers(1, 16, 2), (0, 1)))
        for m in base.labels
    ]
    for m in labels:
        m[16:32, 32:48] = 0
    return held(base.images, [m.astype(np.int32) for m in labels], part)


def brute_force(features, train, val, settings, n_classes=3):
    """Everything in float64 and loops, from the definitions. Features are rounded to float16, as they are
    held."""
    keys, shares = [], []
    with torch.no_grad():
        found = torch.cat([t.patches for t in features(pixels_of(train))]).double().numpy()
        queries = torch.cat([t.patches for t in features(pixels_of(val))]).double().numpy()
    for image, labels in zip(found, train.labels):
        for place, feature in enumerate(image):
            row, column = (PATCH * i for i in divmod(place, GRID))
            inside = labels[row : row + PATCH, column : column + PATCH].ravel().tolist()
            counts = [inside.count(c + 1) for c in range(n_classes)]
            if sum(counts):
                keys.append((feature / np.linalg.norm(feature)).astype(np.float16).astype(np.float64))
                shares.append([count / sum(counts) for count in counts])
    maps = []
    for image in queries:
        scores = np.zeros((GRID * GRID, n_classes))
        for place, query in enumerate(image):
            cosines = [float(key @ query / np.linalg.norm(query)) for key in keys]
            near = sorted(range(len(keys)), key=lambda i: -cosines[i])[: settings.k]
            weights = np.exp([cosines[i] / settings.temperature for i in near])
            for weight, i in zip(weights / weights.sum(), near):
                scores[place] += weight * np.array(shares[i])
        grid = torch.from_numpy(scores.T.reshape(1, n_classes, GRID, GRID))
        maps.append(1 + F.interpolate(grid, size=(SIDE, SIDE), mode="bilinear")[0].argmax(0).numpy())
    predicted, labels = np.stack(maps), np.stack(val.labels)

    def ious(names):
        renamed, counted = np.array([0, *names])[predicted], labels > 0
        pairs = [((renamed == c) & counted, labels == c) for c in range(1, n_classes + 1)]
        return [100 * (a & b).sum() / (a | b).sum() for a, b in pairs]

    return maps, len(keys), ious((1, 2, 3)), max(np.mean(ious(names)) for names in permutations((1, 2, 3)))


@pytest.mark.parametrize("k", [1, 5, 30, 1000])
def test_it_is_the_brute_force_restatement(k, monkeypatch):
    monkeypatch.setattr(in_context_module, "QUERIES", 5)
    monkeypatch.setattr(in_context_module, "CHUNK", 7)  # fewer than k
    train, val, settings = ragged_set(5, "train"), ragged_set(3, "val"), replaced(WHOLE, dict(k=k))
    backbone = tiny_vit()
    with torch.no_grad():
        backbone.norm.weight.mul_(10)
    with frozen(backbone):
        features = features_of(backbone)
        outcome = in_context(features, train, val, settings, n_shown=3)
        maps, held_patches, ious, matched = brute_force(features, train, val, settings)
        assert remember(features, train, settings, SIDE).n == held_patches == 5 * 15
    assert np.array_equal(np.stack(outcome.maps["in_context"]), np.stack(maps))
    assert outcome.maps["in_context"][0].dtype == np.int32 and len(np.unique(maps)) == 3
    assert list(outcome.metrics["in_context_class_iou"].values()) == pytest.approx(ious, abs=1e-9)
    assert outcome.metrics["in_context_miou"] == pytest.approx(np.mean(ious), abs=1e-9)
    assert outcome.metrics["in_context_hungarian_miou"] == pytest.approx(matched, abs=1e-9)


def test_renamed_classes_cost_the_identity_and_not_the_hungarian_miou():
    train, val = blocks_set(6, "train", (1, 2, 3)), blocks_set(3, "val", (1, 2, 3))
    whole = [
        np.repeat(m[:1, :1], SIDE, 0).repeat(SIDE, 1) for m in val.labels
    ]  # one class an image: no edges to enlarge
    val = held([np.broadcast_to(image[:1, :1], image.shape) for image in val.images], whole, "val")
    settings = replaced(WHOLE, dict(k=1))
    right = in_context(features_of(Colors()), train, val, settings).metrics
    names = sorted({"abc"[m[0, 0] - 1] for m in whole})
    assert right == {
        "in_context_miou": 100,
        "in_context_hungarian_miou": 100,
        "val_classes": len(names),
        "in_context_class_iou": dict.fromkeys(names, 100),  # a class that val lacks is none
    }
    renamed = held(train.images, [np.array([0, 2, 3, 1])[m] for m in train.labels])
    wrong = in_context(features_of(Colors()), renamed, val, settings).metrics
    assert wrong["in_context_miou"] == 0 and wrong["in_context_hungarian_miou"] == 100


def test_counts_of_a_patch():
    labels = np.random.default_rng(0).integers(0, 4, (12, 12)).astype(np.int32)
    labels[4:8, 8:] = 0
    counts = patch_counts(labels, 4, 3)
    assert counts.shape == (9, 3) and counts[5].tolist() == [0, 0, 0]
    for place in range(9):
        row, column = (4 * i for i in divmod(place, 3))
        inside = labels[row : row + 4, column : column + 4]
        assert counts[place].tolist() == [(inside == c).sum() for c in (1, 2, 3)]


def memory_of(features, counts):
    memory = Memory(len(features), len(features[0]), len(counts[0]), CPU)
    memory.add(torch.tensor(features), torch.tensor(counts))
    return memory


def test_equal_neighbors_weigh_the_same_and_half_shares_are_kept():
    memory = memory_of([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]], [[256, 0, 0], [0, 0, 7], [0, 4, 0]])
    query = torch.tensor([[3.0, 0.0]])
    torch.testing.assert_close(memory.attend(query, 2, 0.02), torch.tensor([[0.5, 0.0, 0.5]]))
    one = memory.attend(query, 1, 0.02)[0].tolist()
    assert one in ([1, 0, 0], [0, 0, 1]) and memory.attend(query, 1, 0.02)[0].tolist() == one
    torch.testing.assert_close(
        memory.attend(query, 50, 0.02), torch.tensor([[0.5, 0.0, 0.5]])
    )  # exp(-50) of the third
    far = memory.attend(query, 50, 1.0)[0]
    assert far[1].item() == pytest.approx(1 / (1 + 2 * np.e))
    shared = memory_of([[1.0, 0.0]], [[3, 1, 0]]).attend(query, 30, 0.02)
    torch.testing.assert_close(shared, torch.tensor([[0.75, 0.25, 0.0]]))


def test_chunks_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(0)
    features, counts = torch.randn(50, 6, generator=g), torch.randint(1, 9, (50, 3), generator=g)
    memory, queries = memory_of(features.tolist(), counts.tolist()), torch.randn(20, 6, generator=g)
    cosines, places = memory.nearest(queries, 9)
    expected = F.cosine_similarity(queries[:, None].double(), features[None].double(), dim=2).topk(9)
    assert torch.equal(places, expected.indices)
    torch.testing.assert_close(cosines.double(), expected.values, atol=1e-3, rtol=0)  # float16
    for chunk in (1, 4, 9, 49, 50):
        monkeypatch.setattr(in_context_module, "CHUNK", chunk)
        assert torch.equal(memory.nearest(queries, 9)[1], places)


def test_patches_of_rare_classes_are_held_first():
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 3, (40, 4)) * (rng.random((40, 4)) < [0.9, 0.3, 0.1, 0.0])
    u = np.random.default_rng(5).random(40)
    scores = {}
    for place, own in enumerate(counts):
        if own.sum():
            scores[place] = u[place] * sum((counts[:, c] > 0).sum() for c in range(4) if own[c])
    expected = sorted(scores, key=scores.get)
    assert 20 < len(expected) < 40
    assert choose(np.random.default_rng(5), counts, 12).tolist() == expected[:12]
    assert choose(np.random.default_rng(5), counts, 99).tolist() == expected
    pure = np.repeat(np.eye(2, dtype=int), [36, 4], 0)  # one class a patch, the second in a tenth of them
    held_rare = [pure[choose(np.random.default_rng(seed), pure, 10), 1].mean() for seed in range(100)]
    assert 0.25 < np.mean(held_rare) <= 0.4


def test_the_memory_is_bounded_and_drawn_from_all_images():
    train, features = blocks_set(10, "train", (1, 2, 3)), features_of(Colors())
    sizes = {
        size: remember(features, train, replaced(WHOLE, dict(memory_size=size, passes=2)), SIDE).n
        for size in (1000, 320, 100, 7)
    }
    assert sizes == {1000: 2 * 10 * 16, 320: 2 * 10 * 16, 100: 2 * 10 * 5, 7: 2 * 3}
    labels = held(train.images, [m * (i == 4) for i, m in enumerate(train.labels)])  # one image is labeled
    assert remember(features, labels, replaced(WHOLE, dict(memory_size=100)), SIDE).n == 10
    with pytest.raises(UserError, match="set: no pixel of the training part is counted"):
        remember(features, held(train.images, [m * 0 for m in train.labels]), WHOLE, SIDE)
    with pytest.raises(UserError, match="set: no pixel of the validation part is counted"):
        in_context(features, train, held(train.images[:2], [m * 0 for m in train.labels[:2]], "val"), WHOLE)


def test_memory_holds_normalized_features_beside_their_own_labels():
    train, backbone = ragged_set(3, "train"), tiny_vit()
    with frozen(backbone):
        memory = remember(features_of(backbone), train, replaced(WHOLE, dict(memory_size=30)), SIDE)
        patches = backbone(normalize(pixels_of(train))).patches
    assert memory.n == 30 and memory.features.dtype == torch.float16
    for index in range(3):
        counts = patch_counts(train.labels[index], PATCH, 3)
        own = F.normalize(patches[index], dim=1)
        for row in range(10 * index, 10 * index + 10):
            place = (own - memory.features[row].float()).abs().amax(1).argmin()
            torch.testing.assert_close(memory.features[row].float(), own[place], atol=1e-3, rtol=0)
            assert memory.counts[row].tolist() == counts[place].tolist()


def test_a_seed_is_the_whole_of_chance():
    train, val, features = random_set(6), random_set(3, "val"), features_of(tiny_vit())
    settings = replaced(WHOLE, dict(memory_size=60, passes=2, augment=True, seed=5))
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        first, again = (in_context(features, train, val, settings, 3) for _ in range(2))
        one, two, other = (
            remember(features, train, s, SIDE) for s in (settings, settings, replaced(settings, dict(seed=6)))
        )
        plain = remember(features, train, replaced(settings, dict(augment=False)), SIDE)
    assert first.metrics == again.metrics and np.array_equal(
        first.maps["in_context"], again.maps["in_context"]
    )
    assert torch.equal(one.features[: one.n], two.features[: two.n]) and torch.equal(
        one.counts[: one.n], two.counts[: two.n]
    )
    assert not torch.equal(one.features, other.features) and not torch.equal(one.features, plain.features)
    assert not torch.equal(one.features[:30], one.features[30:60])  # the second pass sees other crops
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(
        np.random.get_state()[1], states[1]
    )


@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize(
    "evaluate, settings", [(linear, WHOLE_LINEAR), (in_context, WHOLE)], ids=["linear", "in_context"]
)
def test_the_backbone_stays_as_it_is(evaluate, settings, kind):
    backbone = tiny_vit().train()
    if kind == "bfloat16":
        backbone = backbone.bfloat16()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else None
    with frozen(backbone):
        outcome = evaluate(features_of(backbone, autocast), random_set(6), random_set(3, "val"), settings)
    assert np.isfinite(outcome.metrics[f"{evaluate.__name__}_miou"])
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters()) and backbone.training


def test_jitter_is_torchvisions():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    assert np.array_equal(jittered(np.random.default_rng(1), pixels, 0.1, 0.0), pixels)
    rng = np.random.default_rng(1)
    rng.random(4)
    drawn = 2 * rng.random(4) - 1
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    for adjust, factor in zip((T.adjust_brightness, T.adjust_contrast, T.adjust_saturation), 1 + 0.1 * drawn):
        expected = adjust(expected, factor)
    expected = T.adjust_hue(expected, 0.1 * drawn[3]).permute(1, 2, 0).numpy() * 255
    found = jittered(np.random.default_rng(1), pixels, 0.1, 1.0)
    assert (
        np.abs(found - expected).max() <= 4 and np.abs(found - pixels.astype(float)).max() > 10
    )  # four roundings
    changed = [
        not np.array_equal(jittered(np.random.default_rng(seed), pixels, 0.1, 0.5), pixels)
        for seed in range(100)
    ]
    assert 85 < sum(changed) < 100  # 15 / 16


def test_a_folder_of_images_as_they_come(tmp_path):
    write_ade(tmp_path, n_train=8, n_val=4)
    train, val = (
        open_label_set(tmp_path, part, "folder", 4, MaskRule(void=("0", "255"))) for part in ("train", "val")
    )
    found = in_context(features_of(Colors()), train, val, replaced(WHOLE, dict(augment=True, passes=2)), 1)
    assert found.metrics["in_context_miou"] > 60 and found.maps["in_context"][0].max() <= 4
    settings = LinearSettings(image_px=SIDE, label_px=20, batch_size=4, lr=0.5)
    assert linear(features_of(Colors()), train, val, settings).metrics["linear_miou"] > 40


def test_sides_that_are_no_whole_patches_and_bad_settings():
    train, val, features = random_set(4), random_set(2, "val"), features_of(tiny_vit())
    with torch.no_grad():
        assert in_context(features, train, val, replaced(WHOLE, dict(image_px=79))) == in_context(
            features, train, val, WHOLE
        )
    with pytest.raises(UserError, match="image_px=15 is less than a patch of 16"):
        in_context(features, train, val, replaced(WHOLE, dict(image_px=15)))
    for name in ("k", "temperature", "memory_size", "passes", "map_px"):
        with pytest.raises(UserError, match=f"in_context.{name}=0.* should be greater than"):
            settings_of(["in_context"], [f"in_context.{name}=0"])


def test_a_signal_stops_the_search_between_chunks(monkeypatch):
    monkeypatch.setattr(in_context_module, "CHUNK", 16)
    train, val, features, signals, seen = (
        blocks_set(4, "train", (1, 2, 3)),
        blocks_set(3, "val", (1, 2)),
        features_of(Colors()),
        StopSignals(),
        [],
    )

    def interrupted(signals, where):
        seen.append(where)
        signals.received = "SIGTERM" if len(seen) == 2 else None
        check_signals(signals, where)

    monkeypatch.setattr(in_context_module, "check_signals", interrupted)
    with pytest.raises(Interrupted, match="SIGTERM at in_context"):
        in_context(features, train, val, WHOLE, signals=signals)
    assert len(seen) == 2  # of four chunks


def test_hours_of_search_are_told_before(monkeypatch, capsys):
    train, val, features = (
        blocks_set(4, "train", (1, 2, 3)),
        blocks_set(3, "val", (1, 2)),
        features_of(Colors()),
    )
    monkeypatch.setattr(in_context_module, "search_seconds", lambda features, k: 3600 * 50 / (48 * 64))
    in_context(features, train, val, WHOLE, signals=StopSignals())
    assert " h on this device" not in capsys.readouterr().out  # too few to be worth a measurement
    monkeypatch.setattr(in_context_module, "TIMED_FROM", 0)
    in_context(features, train, val, WHOLE, signals=StopSignals())
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        "in_context: 48 patches compared with up to 64 (0.0 GB): up to about 50.0 h on this device; less by "
    )
    assert said[0].endswith(" in_context.memory_size")
    assert "in_context, search: 1 of 1 batches of 32 images" in said[1]
    in_context(features, train, val, WHOLE)
    assert not capsys.readouterr().out  # a probe


def test_a_comparison_is_timed(monkeypatch):
    monkeypatch.setattr(in_context_module, "CHUNK", 64)
    features, state = features_of(Colors()), torch.get_rng_state()
    assert 0 < in_context_module.search_seconds(features, 5) < 1e-3
    assert torch.equal(torch.get_rng_state(), state)
