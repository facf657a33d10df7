"""Linear segmentation: the published loop restated in plain torch; what is counted; seeds; a backbone that
stays as it is."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_fixture import randomize
from torch import nn

from pretrain.backbones.vit import Tokens, ViT
from pretrain.data.datasets import LabelSet
from pretrain.data.sampler import Order
from pretrain.errors import UserError
from pretrain.evaluation import features as features_module
from pretrain.evaluation import linear_segmentation as linear_module
from pretrain.evaluation.dense import settings_of
from pretrain.evaluation.features import Features, frozen, whole_patches
from pretrain.evaluation.linear_segmentation import (
    LinearSettings,
    backward,
    cropped,
    drawn,
    fit,
    linear,
    new_head,
)
from pretrain.evaluation.miou import confusion_of, shrink
from pretrain.settings import replaced
from pretrain.views.pixels import normalize

CPU, PATCH, SIDE = torch.device("cpu"), 16, 64
WHOLE = LinearSettings(
    image_px=SIDE, label_px=20, epochs=3, batch_size=5, drop_at=2, augment=False, map_px=32
)


@dataclass(frozen=True, eq=False, kw_only=True)
class InMemory(LabelSet):
    """A labeled set of arrays; ``files`` are their places."""

    images: list
    labels: list

    def read(self, index):
        return self.images[self.files[index]], self.labels[self.files[index]]


def held(images, labels, part="train", n_classes=3):
    classes = tuple("abcdefgh"[:n_classes])
    return InMemory(
        name="set",
        part=part,
        classes=classes,
        files=range(len(images)),
        table=np.arange(9),
        images=[*images],
        labels=[*labels],
    )


def random_set(n, part="train", seed=0, side=SIDE, n_classes=3):
    """Rectangles of classes, and of pixels that are not counted, on noise."""
    rng = np.random.default_rng([seed, part == "val"])
    labels = (
        rng.integers(0, n_classes + 1, (n, 8, 8)).repeat(side // 8, 1).repeat(side // 8, 2).astype(np.int32)
    )
    images = np.clip(60 * labels[..., None] + rng.integers(0, 90, (n, side, side, 3)), 0, 255).astype(
        np.uint8
    )
    return held(images, labels, part, n_classes)


def tiny_vit(**model_kwargs):
    return randomize(ViT(**{**dict(embed_dim=24, depth=2, num_heads=2, pos_grid=4), **model_kwargs}))


def features_of(backbone, autocast=None):
    return Features(backbone, CPU, autocast or nullcontext())


class Colors(nn.Module):
    """A stand-in for a ViT: a patch's feature is the mean of its colors, and 1."""

    def __init__(self):
        super().__init__()
        self.patch_size, self.embed_dim = PATCH, 4
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 1, 1)

    def forward(self, x, position_mask=None):
        means = F.avg_pool2d(x, PATCH).flatten(2).transpose(1, 2)
        return Tokens(means[:, 0], means[:, :0], F.pad(means, (0, 1), value=1.0))


def blocks_set(n, part, classes, seed=0):
    """Whole patches of one color each, by which their class is told: red, green or blue."""
    labels = np.random.default_rng([seed, part == "val"]).choice(classes, (n, SIDE // PATCH, SIDE // PATCH))
    labels = labels.repeat(PATCH, 1).repeat(PATCH, 2).astype(np.int32)
    return held(np.eye(4, dtype=np.uint8)[labels][..., 1:] * 200 + 20, labels, part)


@pytest.mark.parametrize("chunk", [2, 32])
def test_the_head_is_trained_as_the_published_loop_trains_it(chunk, monkeypatch):
    for module in (linear_module, features_module):
        monkeypatch.setattr(module, "FORWARD_BATCH", chunk)  # images whose gradients are added up
    train, backbone = random_set(12), tiny_vit()
    head = new_head(24, 3, seed=7)
    conv = nn.Conv2d(24, 3, 1)
    with torch.no_grad():
        conv.weight.copy_(head.weight[..., None, None])
        conv.bias.copy_(head.bias)
        fit(head, features_of(backbone), train, replaced(WHOLE, dict(seed=3, lr=0.5)), SIDE)
        images = torch.from_numpy(np.stack(train.images)).permute(0, 3, 1, 2)
        maps = backbone(normalize(images)).patches.transpose(1, 2).unflatten(2, (4, 4))
    masks = torch.from_numpy(np.stack(train.labels)).float()[:, None] - 1
    masks[masks < 0] = 255
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.5, momentum=0.9, weight_decay=0.0001)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, gamma=0.1, step_size=2)
    before, order = conv.weight.detach().clone(), Order(12, 5, seed=3)
    for epoch in range(3):
        for start in (0, 5):  # two do not fill a batch
            batch = [order.image(10 * epoch + start + i) for i in range(5)]
            enlarged = F.interpolate(maps[batch], size=(20, 20), mode="bilinear")
            targets = F.interpolate(masks[batch], size=(20, 20), mode="nearest").long().squeeze(1)
            loss = nn.CrossEntropyLoss(ignore_index=255)(conv(enlarged), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    assert (conv.weight - before).abs().max() > 0.01
    torch.testing.assert_close(head.weight, conv.weight[..., 0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias, conv.bias, rtol=1e-4, atol=1e-5)


def test_miou_is_that_of_the_published_validation():
    val, backbone, head = random_set(5, "val"), tiny_vit(), new_head(24, 3, seed=0)
    with frozen(backbone):
        confusion, _ = confusion_of(head, features_of(backbone), val, SIDE, 20, 32, 0)
        images = torch.from_numpy(np.stack(val.images)).permute(0, 3, 1, 2)
        maps = backbone(normalize(images)).patches.transpose(1, 2).unflatten(2, (4, 4))
        enlarged = F.interpolate(maps, size=(20, 20), mode="bilinear")
        predicted = F.conv2d(enlarged, head.weight[..., None, None], head.bias).argmax(1)
    masks = F.interpolate(
        torch.from_numpy(np.stack(val.labels)).float()[:, None], size=(20, 20), mode="nearest"
    )[:, 0].long()
    for a in range(3):
        for b in range(3):
            assert confusion[a, b] == ((predicted == a) & (masks == b + 1)).sum()
    assert confusion.sum() == (masks > 0).sum() < masks.numel()


def test_a_set_that_color_separates_is_segmented():
    train, val = (blocks_set(n, part, (1, 2, 3)) for n, part in ((24, "train"), (6, "val")))
    settings = replaced(
        WHOLE,
        dict(label_px=4, map_px=SIDE, epochs=25, batch_size=8, lr=0.3, augment=True, crop_scale=(1.0, 1.0)),
    )
    outcome = linear(
        features_of(Colors()), train, val, replaced(settings, dict(crop_ratio=(1.0, 1.0))), n_shown=2
    )
    assert outcome.metrics["linear_miou"] == 100
    assert outcome.metrics["linear_class_iou"] == {"a": 100, "b": 100, "c": 100}
    assert len(outcome.maps["linear"]) == 2
    for found, labels in zip(outcome.maps["linear"], val.labels):
        assert found.dtype == np.int32 and found.shape == (SIDE, SIDE) and set(np.unique(found)) <= {1, 2, 3}
        centers = np.s_[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        assert np.array_equal(found[centers], labels[centers])


def test_classes_that_a_part_lacks():
    settings = replaced(WHOLE, dict(label_px=4, epochs=25, batch_size=8, lr=0.3))
    features = features_of(Colors())
    absent = linear(
        features, blocks_set(24, "train", (1, 2, 3)), blocks_set(6, "val", (1, 3)), settings
    ).metrics
    assert absent == {"linear_miou": 100, "val_classes": 2, "linear_class_iou": {"a": 100, "c": 100}}
    val = blocks_set(6, "val", (1, 2))
    val = replace(val, labels=[*val.labels[:5], np.where(val.labels[5] == 2, 3, val.labels[5])])
    wrong, right = ((np.stack(val.labels) == c).sum() for c in (3, 2))
    unseen = linear(features, blocks_set(24, "train", (1, 2)), val, settings).metrics
    assert unseen["linear_class_iou"] == {"a": 100, "b": pytest.approx(100 * right / (right + wrong)), "c": 0}
    assert unseen["linear_miou"] == pytest.approx(
        (100 + unseen["linear_class_iou"]["b"]) / 3
    )  # what occurs in labels counts


def test_what_is_not_counted_changes_nothing():
    g = torch.Generator().manual_seed(0)
    patches, labels = torch.randn(40, 16, 4, generator=g), torch.randint(0, 4, (40, 20, 20), generator=g)

    def gradient(patches, labels):
        head = new_head(4, 3, seed=0)
        backward(head, patches.split(32), labels)
        return torch.cat([head.weight.grad.flatten(), head.bias.grad])

    labels[7:] = 0
    assert gradient(patches, labels).abs().max() > 0.01
    torch.testing.assert_close(gradient(patches, labels), gradient(patches[:7], labels[:7]))
    assert not gradient(patches[7:], labels[7:]).any()  # no pixel: no NaN

    train, val, empty = random_set(6), random_set(4, "val"), np.zeros((6, SIDE, SIDE), np.int32)
    with pytest.raises(UserError, match="set: no pixel of the training part"):
        linear(features_of(Colors()), held(train.images, empty), val, WHOLE)
    with pytest.raises(UserError, match="set: no pixel of the validation part"):
        linear(features_of(Colors()), train, held(val.images, empty[:4], "val"), WHOLE)


def weights_after(settings, train, backbone=None):
    head = new_head(4 if backbone is None else backbone.embed_dim, 3, settings.seed)
    fit(head, features_of(backbone or Colors()), train, settings, SIDE)
    return torch.cat([head.weight, head.bias[:, None]], 1).detach()


def test_held_features_are_those_of_each_epoch(monkeypatch):
    train, backbone = random_set(7), tiny_vit()
    with torch.no_grad():
        fast = weights_after(WHOLE, train, backbone)
        monkeypatch.setattr(linear_module, "HELD_BYTES", 4 * 7 * 16 * 24 - 1)
        reads = []
        monkeypatch.setattr(InMemory, "squares", lambda *args: reads.append(args))
        slow = weights_after(WHOLE, train, backbone)
    assert reads == []
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


def test_crops_and_flips_move_image_and_labels_alike():
    train = random_set(6)
    plain = weights_after(WHOLE, train)
    whole = replaced(WHOLE, dict(augment=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)))
    torch.testing.assert_close(weights_after(replaced(whole, dict(flip_p=0.0)), train), plain)
    mirrored = held(
        [np.fliplr(image) for image in train.images], [np.fliplr(labels) for labels in train.labels]
    )
    flipped = weights_after(replaced(whole, dict(flip_p=1.0)), train)
    torch.testing.assert_close(flipped, weights_after(WHOLE, mirrored))
    assert not torch.allclose(flipped, plain)

    values = np.arange(40 * 48, dtype=np.int32).reshape(40, 48)
    pixels = np.stack([values % 256, values // 256, values * 0], -1).astype(np.uint8)
    areas = []
    for seed in range(50):
        part, labels = cropped(np.random.default_rng(seed), pixels, values, (0.8, 1.0), (3 / 4, 4 / 3))
        assert np.array_equal(part[..., 0] + 256 * part[..., 1].astype(int), labels)
        areas.append(labels.size / values.size)
    assert 0.78 < min(areas) < 0.83 and 0.95 < max(areas) <= 1  # rounded to whole pixels


def test_each_epoch_has_crops_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(linear_module, "cropped", lambda *of: seen.append(cropped(*of)) or seen[-1])
    weights_after(replaced(WHOLE, dict(augment=True, crop_scale=(0.3, 1.0))), random_set(8))
    assert len({part.tobytes() for part, _ in seen}) == len(seen) == 3 * 5  # of 8 images


def test_a_seed_is_the_whole_of_chance():
    train, val, features = random_set(8), random_set(4, "val"), features_of(tiny_vit())
    settings = replaced(WHOLE, dict(augment=True, crop_scale=(0.3, 1.0), seed=5))
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        first, again = (linear(features, train, val, settings, 4) for _ in range(2))
        other = linear(features, train, val, replaced(settings, dict(seed=6)), 4)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(
        np.random.get_state()[1], states[1]
    )
    assert first.metrics == again.metrics and np.array_equal(first.maps["linear"], again.maps["linear"])
    assert first.metrics != other.metrics
    assert torch.equal(weights_after(settings, train), weights_after(settings, train))
    assert not torch.equal(
        weights_after(settings, train), weights_after(replaced(settings, dict(epochs=4)), train)
    )


def test_the_first_weights_are_a_convolutions():
    head, bound = new_head(400, 50, seed=0), 400**-0.5
    conv = nn.Conv2d(400, 50, 1)
    for ours, theirs in ((head.weight, conv.weight), (head.bias, conv.bias)):
        assert ours.abs().max() <= bound and theirs.abs().max() <= bound
        assert ours.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
        assert theirs.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_sides_that_are_no_whole_patches():
    train, val, features = random_set(6), random_set(3, "val"), features_of(tiny_vit())
    assert whole_patches(79, features) == SIDE and whole_patches(SIDE, features) == SIDE
    with torch.no_grad():
        assert linear(features, train, val, replaced(WHOLE, dict(image_px=79))) == linear(
            features, train, val, WHOLE
        )
    with pytest.raises(UserError, match="image_px=15 is less than a patch of 16"):
        linear(features, train, val, replaced(WHOLE, dict(image_px=15)))


@pytest.mark.parametrize("sides", [(448, 100), (444, 100), (64, 100), (504, 504)])
def test_labels_shrink_as_torchs_nearest(sides):
    labels = torch.arange(sides[0] ** 2, dtype=torch.int32).view(1, sides[0], sides[0])
    expected = F.interpolate(labels[:, None].double(), size=(sides[1], sides[1]), mode="nearest")[:, 0]
    assert torch.equal(shrink(labels, sides[1]).double(), expected)


def test_bad_settings_and_features():
    for name in ("label_px", "epochs", "batch_size", "drop_at", "map_px"):
        with pytest.raises(UserError, match=f"linear.{name}=0 should be greater than or equal to 1"):
            settings_of(["linear"], [f"linear.{name}=0"])
    backbone = tiny_vit()
    with torch.no_grad():
        backbone.norm.weight[0] = float("nan")
        with pytest.raises(UserError, match="not finite"):
            linear(features_of(backbone), random_set(3), random_set(2, "val"), WHOLE)


def test_of_coco_the_layer_sees_some_images_drawn_from_the_seed(monkeypatch):
    train, features, settings = (
        random_set(12),
        features_of(Colors()),
        replaced(WHOLE, dict(coco_images=5, label_px=4)),
    )
    coco = replace(train, name="coco_stuff")
    assert drawn(train, settings) is train and list(
        drawn(coco, replaced(settings, dict(coco_images=99))).files
    ) == list(range(12))
    for seed in range(3):
        places = drawn(coco, replaced(settings, dict(seed=seed))).files
        assert len(set(places)) == 5 and list(places) == sorted(places)
    assert len({tuple(drawn(coco, replaced(settings, dict(seed=seed))).files) for seed in range(5)}) > 3
    read = []
    monkeypatch.setattr(
        InMemory, "read", lambda self, i: read.append(self.files[i]) or (self.images[i], self.labels[i])
    )
    with torch.no_grad():
        linear(features, coco, held(train.images, train.labels, "val"), settings)
    assert read[:5] == drawn(coco, settings).files and read[5:] == list(
        range(12)
    )  # all of the validation part
    with pytest.raises(UserError, match="linear.coco_images=0"):
        settings_of(["linear"], ["linear.coco_images=0"])
