"""Local crops inside their global ones, plain global crops, positions as at inference: the rules of dense
post-training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import TINY, last, write_photos

from pretrain.backbones.vit import ViewGroup, ViT
from pretrain.config import load_config
from pretrain.data.loader import Collate, build_dataset
from pretrain.methods.paka import PaKA
from pretrain.settings import build, read_words, replaced
from pretrain.views.boxes import (
    TRIES,
    CropSettings,
    PositionSettings,
    augment_positions,
    draw_crops,
    draw_move,
    draw_views,
    pixel_boxes,
)
from pretrain.views.color import ColorSettings, draw_colors
from pretrain.views.pixels import crop_resize, normalize

PAKA = CropSettings(
    n_global=2, n_local=4, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_rule="inside"
)
SIZES = [(480, 640), (640, 427), (100, 1000), (37, 41), (7, 8), (3, 2000), (1, 50), (50, 1), (1, 1)]
FIXED = PositionSettings(augment=False)


def changed(rule, **keys):
    return replaced(rule, keys)


def draw(size, rule, n=1, positions=FIXED, tied=True, seed=0):
    """Views of ``n`` images of a size (height, width), their generators, and the crops in pixels as
    float64, [n, V, 4]."""
    rngs = [np.random.default_rng([seed, i]) for i in range(n)]
    views = draw_views(np.array([size] * n, np.float64), rule, positions, rngs, tied)
    return views, rngs, pixel_boxes(views.boxes, *size).double().numpy()


def with_parents(crops, rule):
    """Global crops repeated for their local ones, and these: [n, L, 4] each."""
    return crops[:, [local % rule.n_global for local in range(rule.n_local)]], crops[:, rule.n_global :]


def area(boxes):
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@pytest.mark.parametrize("inside", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_every_local_crop_lies_in_its_parent(size, inside):
    rule = changed(PAKA, n_global=3, n_local=7, local_inside=inside)
    _, _, crops = draw(size, rule, 500)
    parent, local = with_parents(crops, rule)
    low, high = np.maximum(parent[..., :2], local[..., :2]), np.minimum(parent[..., 2:], local[..., 2:])
    common = (high - low).clip(0).prod(-1)
    assert (common >= inside * area(local) - 1e-9).all()
    assert (
        (local[..., :2] >= 0).all() and (local[..., 2] <= size[1]).all() and (local[..., 3] <= size[0]).all()
    )
    assert (local[..., 2:] - local[..., :2] >= 1).all()
    if min(size) > 300 and inside < 1:
        assert (common < area(local)).mean() > 0.05 and (
            common / area(local)
        ).min() < inside + 0.1  # the slack is used


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (2000, 1000)])
def test_areas_and_ratios_are_the_rules(size):
    """Of the parent's area and not of the image's, uniform in local_scale; ratios log-uniform; up to the
    rounding to pixels."""
    _, _, crops = draw(size, PAKA, 2000)
    parent, local = with_parents(crops, PAKA)
    w, h = local[..., 2] - local[..., 0], local[..., 3] - local[..., 1]
    share, rounding = area(local) / area(parent), (w + h) / 2 / area(parent) + 1e-6
    assert (share >= 0.05 - rounding).all() and (share <= 0.4 + rounding).all()
    n = share.size
    assert abs(share.mean() - 0.225) < 4 * 0.35 / math.sqrt(12 * n) + 1e-3
    assert abs(share.std() - 0.35 / math.sqrt(12)) < 0.005
    logs = np.log(w / h)
    assert (abs(logs) <= math.log(4 / 3) + 1 / w + 1 / h).all() and abs(logs.mean()) < 0.01
    assert abs(logs.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01


def test_places_are_uniform():
    """The centers' mean is the parent's; in a parent far from the image's border the place is uniform,
    slack included."""
    _, _, crops = draw((600, 800), PAKA, 4000)
    parent, local = with_parents(crops, PAKA)
    size = parent[..., 2:] - parent[..., :2]
    offset = ((local[..., :2] + local[..., 2:]) - (parent[..., :2] + parent[..., 2:])) / 2 / size  # [n, L, 2]
    # an image's local crops share their parents: four standard errors of the mean over images, not over crops
    assert (abs(offset.mean((0, 1))) < 4 * offset.mean(1).std(0) / math.sqrt(4000)).all()
    small = changed(PAKA, global_scale=(0.05, 0.1), local_scale=(0.2, 0.2))
    _, _, crops = draw((2000, 2000), small, 4000)
    parent, local = (x.reshape(-1, 4) for x in with_parents(crops, small))
    side = local[:, 2:] - local[:, :2]
    slack = np.floor(side * (1 - math.sqrt(0.9)))
    free = ((parent[:, :2] > slack) & (parent[:, 2:] + slack < 2000)).all(1)
    where = (local[:, :2] - parent[:, :2] + slack) / (
        parent[:, 2:] - parent[:, :2] - side + 2 * slack
    )  # [n, 2] in [0, 1]
    for axis in (0, 1):
        ranks = np.sort(where[free, axis])
        distance = abs(ranks - (np.arange(len(ranks)) + 0.5) / len(ranks)).max()
        assert (
            distance < 1.95 / math.sqrt(len(ranks)) + 0.005
        )  # Kolmogorov-Smirnov, once in a thousand; and the pixels
    assert abs(np.corrcoef(where[free].T)[0, 1]) < 0.05


def test_too_long_crops_are_cut_to_their_parent():
    rule = changed(PAKA, local_scale=(0.9, 1.0), ratio=(0.25, 4.0), local_inside=1.0)
    _, _, crops = draw((300, 400), rule, 500)
    parent, local = with_parents(crops, rule)
    assert (local[..., :2] >= parent[..., :2]).all() and (local[..., 2:] <= parent[..., 2:]).all()
    assert ((local == parent)[..., 0] & (local == parent)[..., 2]).any()


@pytest.mark.parametrize("size", SIZES)
def test_same_is_the_parents_box(size):
    rule = changed(PAKA, local_rule="same", n_local=5)
    views, _, _ = draw(size, rule, 50)
    assert torch.equal(views.boxes[:, 2:], views.boxes[:, [0, 1, 0, 1, 0]])
    assert 0.3 < views.flips[:, 2:].float().mean() < 0.7  # flips are the local crops' own
    assert (views.flips[:, 2] != views.flips[:, 0]).any()


@pytest.mark.parametrize(
    "positions, tied",
    [(FIXED, True), (PositionSettings(), True), (PositionSettings(), False)],
    ids=["fixed", "augmented", "untied"],
)
def test_rules_take_the_same_numbers(positions, tied):
    """Whatever the rules, an image's global crops and flips are the same, and so is what is drawn after
    them."""
    plain = changed(PAKA, local_rule="image")
    first, rngs, _ = draw((480, 640), plain, 8, positions, tied)
    after = [rng.random() for rng in rngs]
    for rule in (
        changed(plain, local_rule="inside"),
        changed(plain, local_rule="same"),
        changed(plain, plain_globals=True),
    ):
        views, rngs, _ = draw((480, 640), rule, 8, positions, tied)
        assert [rng.random() for rng in rngs] == after
        assert torch.equal(views.boxes[:, :2], first.boxes[:, :2]) and torch.equal(
            views.flips[:, 2:], first.flips[:, 2:]
        )
        assert torch.equal(views.boxes, first.boxes) == (rule.local_rule == "image")
        assert torch.equal(views.flips, first.flips) != rule.plain_globals
        assert not rule.plain_globals or not views.flips[:, :2].any()


def test_the_default_draw_is_what_it_was():
    """Restated from the stream: a flip and 22 numbers a view, then t_s."""
    size, rule = np.array([[333.0, 517.0]]), CropSettings()
    views, _, _ = draw((333, 517), rule, 1, PositionSettings())
    rng = np.random.default_rng([0, 0])
    u = rng.random((1, 10, 2 * TRIES + 3))
    crops = draw_crops(size, np.array([(0.32, 1.0)] * 2 + [(0.05, 0.32)] * 8), rule.ratio, u[..., 1:]) / [
        517,
        333,
        517,
        333,
    ]
    moved = augment_positions(crops, PositionSettings(), 2, np.array([draw_move(PositionSettings(), rng)]))
    assert torch.equal(views.boxes, torch.from_numpy(crops).float()) and torch.equal(
        views.flips, torch.from_numpy(u[..., 0] < 0.5)
    )
    assert torch.equal(views.position_boxes, torch.from_numpy(moved).float()) and views.tied


def test_plain_globals_keep_their_colors():
    def colors(plain):
        return draw_colors(
            6,
            2,
            ColorSettings(solarize_p=(0.5, 0.5, 0.5)),
            [np.random.default_rng(i) for i in range(50)],
            plain,
        )

    on, off = colors(True), colors(False)
    for name in ("jitter", "gray", "sigma", "solarize"):
        assert not getattr(on, name)[:, :2].any() and getattr(off, name)[:, :2].any()
    for name in ("jitter", "order", "factors", "gray", "sigma", "solarize"):
        assert torch.equal(getattr(on, name)[:, 2:], getattr(off, name)[:, 2:])


@pytest.fixture
def dataset(tmp_path):
    photos = write_photos(tmp_path / "photos", n=4)
    return build_dataset(load_config(None, last([*TINY, f"data.root={photos}", "optim.batch_size=4"])))


def batches(dataset, **crops):
    """The first batch with some crop rules, from both data paths."""
    dataset.rules, found = replace(dataset.rules, crops=changed(dataset.rules.crops, **crops)), []
    for dataset.on_device in (False, True):
        batch, _ = Collate(dataset.rules, 4, dataset.seed)([dataset[i] for i in range(4)])
        found.append(batch.to(torch.device("cpu")))
    return found


def test_both_data_paths_follow_the_rules(dataset):
    rules = dict(local_rule="inside", plain_globals=True, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    on_cpu, on_device = batches(dataset, **rules)
    for name in ("boxes", "flips", "position_boxes"):
        assert torch.equal(getattr(on_cpu.views, name), getattr(on_device.views, name))
    assert not on_cpu.views.flips[:, :2].any()
    for view, crop in enumerate(on_cpu.global_crops):  # cropped, resized, normalized, and nothing else
        g, image = divmod(view, 4)
        pixels = dataset.read(image)[0]
        box = pixel_boxes(on_cpu.views.boxes[image, g], *pixels.shape[:2]).int().tolist()
        plain = normalize(torch.from_numpy(crop_resize(pixels, box, False, 64)).permute(2, 0, 1))
        assert torch.equal(crop, plain)
        assert (on_device.global_crops[view] - plain).abs().mean() * 0.23 * 255 < 0.5
    augmented = batches(dataset, **rules | {"plain_globals": False})
    for plain, changed in zip((on_cpu, on_device), augmented):
        assert torch.equal(plain.local_crops, changed.local_crops)
        assert (plain.global_crops - changed.global_crops).abs().mean() > 0.1


@pytest.mark.parametrize("encoding", ["field", "standard"])
def test_what_positions_a_method_reads(dataset, encoding):
    """Dense post-training with standard positions reads those of a whole image in every crop; nothing else
    changes."""
    words = [f"positions.encoding={encoding}", "positions.augment=false"]
    before = load_config(None, [*TINY, *words]).view_settings()
    assert before.tied and before.masks is not None
    tiny = [*(word for word in TINY if "n_prototypes" not in word), "alignment.min_overlap_patches=0.5"]
    layer = read_words([*tiny, *words, "backbone.weights=start"])
    dense = build(PaKA.Settings, [layer]).view_settings()  # on the engine's defaults, without a recipe
    assert dense == replace(before, masks=None, tied=encoding == "field")
    dataset.rules = dense
    for batch in batches(dataset):
        assert batch.masks is None and batch.views.tied == (encoding == "field")
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand_as(batch.views.boxes)
        assert torch.equal(batch.views.position_boxes, batch.views.boxes if encoding == "field" else whole)


def test_untied_positions_are_those_of_inference():
    """In flipped views too: at inference nothing mirrors the positions of an image."""
    model = ViT(embed_dim=24, depth=1, num_heads=2, pos_encoding="field", pos_grid=9).double()
    torch.nn.init.normal_(model.pos_field)
    crops = torch.randn(4, 3, 32, 48, dtype=torch.float64)  # two views of two images
    views, _, _ = draw((90, 70), CropSettings(n_local=0), 2, PositionSettings(), tied=False)
    views = replace(views, flips=torch.tensor([[True, False], [True, True]]))
    (seen,) = model.forward_views([ViewGroup(crops, *views.globals)])
    torch.testing.assert_close(seen.patches, model(crops).patches, atol=1e-6, rtol=0)
    (tied,) = model.forward_views([ViewGroup(crops, *replace(views, tied=True).globals)])
    assert (tied.patches - seen.patches).abs().amax((1, 2)).gt(1e-3).tolist() == [True, True, False, True]
