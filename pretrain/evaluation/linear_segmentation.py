"""Linear segmentation of frozen features, as Leopart and NeCo measure it.

* Leopart: Ziegler and Asano, "Self-Supervised Learning of Object Parts for Semantic Segmentation", CVPR 2022;
  public code, experiments/linear_probing.
* NeCo: Pariza et al., "Near, far: Patch-ordering enhances vision foundation models' scene understanding",
  ICLR 2025; public code, experiments/linear_segmentation. The same but for the batch and the order.

A 1x1 convolution reads the classes off the patch tokens after the final norm, with neither batch norm nor
dropout before it. Logits and labels meet at 100 x 100, in training and in validation: labels by the nearest
neighbor, first at the image's size. (The public code enlarges the features instead; a 1x1 convolution
commutes with that.)

Ours: images are resized bicubically, as everywhere here; each epoch draws the order (so Leopart; NeCo keeps
that of VOC and ADE20K); every validation image counts (their VOC loader drops the last ones); the network
after the last epoch counts, not the best of all epochs on the validation part; a class that occurs nowhere is
left out of the mean (there it counts 0), and "not labeled" is no class to predict (there it is, of ADE20K); a
batch without a counted pixel has the loss 0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import PositiveFloat
from torch import Tensor, nn

from pretrain.data.datasets import LabelSet
from pretrain.data.datasets.maps import nearest
from pretrain.data.images import in_batches, square
from pretrain.data.sampler import ORDER, VIEWS, Order, generator
from pretrain.errors import UserError
from pretrain.evaluation import Outcome, check_signals
from pretrain.evaluation.features import FORWARD_BATCH, Features, patch_maps, whole_patches
from pretrain.evaluation.miou import (
    class_ious,
    confusion_of,
    mean_iou,
    n_present,
    named_ious,
    shrink,
    tell_untrained,
)
from pretrain.settings import Settings, setting
from pretrain.signals import StopSignals
from pretrain.views.boxes import TRIES, draw_crops

Pixels = NDArray[np.uint8]  # [H, W, 3]
Labels = NDArray[np.int32]  # [H, W]
Range = tuple[float, float]
# Features of the training part that stay in the host's memory where they are the same in each epoch
HELD_BYTES = 2**31


class LinearSettings(Settings):
    """The protocol; sources are files of the two public codes."""

    image_px: int = setting(448, "side, down to whole patches (ours)", source="configs: size_crops", ge=1)
    label_px: int = setting(
        100, "side at which logits and labels meet", source="linear_finetune.py: {train,val}_mask_size", ge=1
    )
    epochs: int = setting(25, "through the training images", source="configs: max_epochs", ge=1)
    coco_images: int = setting(
        11_828, "a tenth of train2017, drawn at random; of other sets all", source="linear_finetune.py", ge=1
    )
    # Leopart: 60 on each of 2 GPUs
    batch_size: int = setting(128, "images; the rest of an epoch is left out", source="NeCo's configs", ge=1)
    lr: float = setting(0.01, "of SGD", source="configs", ge=0)
    momentum: float = setting(0.9, "of SGD", source="linear_finetune.py: configure_optimizers", ge=0)
    weight_decay: float = setting(1e-4, "of SGD", source="linear_finetune.py: configure_optimizers", ge=0)
    drop_at: int = setting(20, "the lr drops every so many epochs (StepLR)", source="configs", ge=1)
    drop_factor: float = setting(0.1, "factor on the lr", source="linear_finetune.py: decay_rate", ge=0)
    augment: bool = setting(True, "crops and flips; false (ours): whole images", source="linear_finetune.py")
    crop_scale: tuple[PositiveFloat, PositiveFloat] = setting(
        (0.8, 1.0), "share of the image's area", source="linear_finetune.py: RandomResizedCrop"
    )
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = setting(
        (3 / 4, 4 / 3), "width / height of a crop", source="linear_finetuning_transforms.py"
    )
    flip_p: float = setting(0.5, "probability of a horizontal flip", source="linear_finetune.py", ge=0, le=1)
    seed: int = setting(0, "of first weights, order, crops and COCO's images", source="ours", ge=0)
    map_px: int = setting(224, "side of the maps for figures", source="ours", ge=1)


def linear(
    features: Features,
    train: LabelSet,
    val: LabelSet,
    settings: LinearSettings,
    n_shown: int = 0,
    signals: StopSignals | None = None,
) -> Outcome:
    """An evaluator: ``linear_miou`` and ``linear_class_iou``, in percent, and maps ``linear``, of a 1x1
    convolution on frozen features; ``val_classes``: how many occur in the labels. Signals are looked at before each epoch."""
    side = whole_patches(settings.image_px, features)
    head = new_head(features.backbone.embed_dim, len(train.classes), settings.seed).to(features.device)
    trained = fit(head, features, drawn(train, settings), settings, side, signals)
    sides = side, settings.label_px, settings.map_px
    confusion, maps = confusion_of(head, features, val, *sides, n_shown, signals)
    tell_untrained(trained, confusion, val.classes, "linear")
    ious = named_ious(class_ious(confusion), val.classes)
    found = {"linear_miou": mean_iou(confusion), "val_classes": n_present(confusion)}
    return Outcome({**found, "linear_class_iou": ious}, {"linear": maps})


def drawn(train: LabelSet, settings: LinearSettings) -> LabelSet:
    """The training images that the head sees: of COCO ``coco_images``, in the set's order."""
    if not train.name.startswith("coco_"):
        return train
    chosen = generator(settings.seed, ORDER, 0).permutation(len(train))[: settings.coco_images]
    return replace(train, files=[train.files[i] for i in sorted(chosen.tolist())])


def new_head(dim: int, n_classes: int, seed: int) -> nn.Linear:
    """A 1x1 convolution of patches [b, N, D], initialized as torch's: uniform within 1 / sqrt(D)."""
    head, draw = nn.utils.skip_init(nn.Linear, dim, n_classes), torch.Generator().manual_seed(seed)
    for parameter in (head.weight, head.bias):
        parameter.data = (2 * torch.rand(parameter.shape, generator=draw) - 1) / dim**0.5
    return head


def fit(
    head: nn.Linear,
    features: Features,
    train: LabelSet,
    settings: LinearSettings,
    side: int,
    signals: StopSignals | None = None,
) -> Tensor:
    """Train the head; ``side`` is that of the images in whole patches. Errors are those of :func:`linear`.

    Returns:
        bool [C], the classes that occurred in the labels.
    """
    seen = torch.zeros(len(train.classes) + 1, dtype=torch.bool)
    held = _held(features, train, settings, side)
    decay = settings.weight_decay
    optimizer = torch.optim.SGD(head.parameters(), settings.lr, settings.momentum, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, settings.drop_at, settings.drop_factor)
    for epoch in range(settings.epochs):
        check_signals(signals, "linear")
        counted = 0
        for patches, labels in _batches(features, train, settings, side, epoch, held):
            optimizer.zero_grad()
            backward(head, patches, labels)
            optimizer.step()
            counted += int((labels > 0).sum())
            seen[labels.unique().long().cpu()] = True
        if not counted:
            raise UserError(f"{train.name}: no pixel of the training part is counted")
        schedule.step()
    return seen[1:]


def backward(head: nn.Linear, patches: Iterable[Tensor], labels: Tensor) -> None:
    """Gradients of a batch's mean cross-entropy over its counted pixels, a few images at a time.

    Args:
        patches: [b, N, D] each, ``FORWARD_BATCH`` images at a time.
        labels: [B, L, L] in 0 (not counted) .. C.
    """
    counted = max(1, int((labels > 0).sum()))
    for part, own in zip(patches, labels.split(FORWARD_BATCH)):
        with torch.enable_grad():
            maps = head(part).transpose(1, 2).unflatten(2, (round(part.shape[1] ** 0.5), -1))  # [b, C, h, w]
            maps = F.interpolate(maps, size=own.shape[1:], mode="bilinear")
            logits = maps.permute(0, 2, 3, 1).flatten(0, 2)
            # As rows: torch has no deterministic cross-entropy of maps on CUDA, which a run may ask for.
            target = own.to(logits.device).long().flatten() - 1
            (F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / counted).backward()


def cropped(
    rng: np.random.Generator, pixels: Pixels, labels: Labels, scale: Range, ratio: Range
) -> tuple[Pixels, Labels]:
    """A part of an image [H, W, 3] and of its labels [H, W], drawn as torchvision's RandomResizedCrop."""
    size_px, u = np.array([labels.shape], np.float64), rng.random((1, 1, 2 * TRIES + 2))
    left, top, right, bottom = draw_crops(size_px, np.array([scale]), ratio, u)[0, 0].astype(int)
    return pixels[top:bottom, left:right], labels[top:bottom, left:right]


def _batches(
    features: Features,
    train: LabelSet,
    settings: LinearSettings,
    side: int,
    epoch: int,
    held: tuple[Tensor, Tensor] | None,
) -> Iterator[tuple[Iterable[Tensor], Tensor]]:
    """Patch features, ``FORWARD_BATCH`` images at a time, and labels [B, L, L] of each batch of an epoch."""
    order = Order(len(train), settings.batch_size, settings.seed)
    chosen = [order.image(epoch * order.epoch_size + place) for place in range(order.epoch_size)]

    def item(index: int) -> tuple[Tensor, Tensor]:
        pixels, labels = train.read(index)
        rng = generator(settings.seed, VIEWS, epoch * len(train) + index)
        if settings.augment:
            pixels, labels = cropped(rng, pixels, labels, settings.crop_scale, settings.crop_ratio)
        image, target = square(pixels, side, crop=False), nearest(labels, side)
        if settings.augment and rng.random() < settings.flip_p:
            image, target = image.flip(-1), target.flip(-1)
        return image, shrink(target, settings.label_px)

    if held is not None:
        for batch in torch.tensor(chosen).split(settings.batch_size):
            yield (part.to(features.device) for part in held[0][batch].split(FORWARD_BATCH)), held[1][batch]
        return
    for items in in_batches(item, chosen, settings.batch_size):
        images, labels = (torch.stack(some) for some in zip(*items))
        yield patch_maps(features, images), labels


def _held(
    features: Features, train: LabelSet, settings: LinearSettings, side: int
) -> tuple[Tensor, Tensor] | None:
    """Features [n, N, D] and labels [n, L, L] of all training images, where they never change and are at
    most ``HELD_BYTES``."""
    n_patches = (side // features.backbone.patch_size) ** 2
    if settings.augment or 4 * len(train) * n_patches * features.backbone.embed_dim > HELD_BYTES:
        return None
    squares = train.squares(side, side, FORWARD_BATCH)
    parts = [
        (x.cpu(), shrink(y, settings.label_px)) for images, y in squares for x in patch_maps(features, images)
    ]
    patches, labels = zip(*parts)
    return torch.cat(patches), torch.cat(labels)
