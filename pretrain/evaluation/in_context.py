"""In-context segmentation: a patch takes the labels of those training patches whose features are nearest,
nothing is trained.

Balazevic et al., "Towards In-context Scene Understanding" (Hummingbird), NeurIPS 2023, as
open-hummingbird-eval 2.0 measures it: the public code that NeCo reports with.

The memory holds L2-normalized patch features of training images, and of each the shares of the classes in its
pixels. A patch of a validation image attends to its k nearest by cosine: softmax(cosine / temperature) weighs
their shares, which are enlarged bilinearly to the image's size; the largest is the class. mIoU is named
twice: that of these classes, and that after Hungarian matching of predicted to true classes, which the public
code reports.

What may be held is drawn image by image: memory / images patches of each, those of the smallest u * score,
where the score of a patch adds up, over the classes in it, the number of the image's patches that hold the
class, and u is uniform in [0, 1): patches of rare classes are likelier.

Ours: pixels that are not counted have no share in a patch, and a patch of them alone is not held (there they
are the first class in memory); images are resized bicubically, as everywhere here; their blue is normalized
by 0.225 (there 0.255); search is exact (there ScaNN) on features held in float16, products being float32; of
equal neighbors at the k-th place torch chooses; k is at most the memory; a class that occurs nowhere is left
out of the mean (there it counts 0).

A held patch takes 2 (D + C) bytes: 8.3 GB for 10,240,000 of a ViT-S and 21 classes. They are on the device if
they fit into half of what is free there, else on the host, from which each chunk is copied again for every
``QUERIES`` patches.
"""

import time
import warnings
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import PositiveFloat
from torch import Tensor

from pretrain.data.datasets import LabelSet, maps
from pretrain.data.images import in_batches, square
from pretrain.data.sampler import VIEWS, generator
from pretrain.errors import UserError
from pretrain.evaluation import Outcome, Tick, check_signals, steps, tell_if_long
from pretrain.evaluation.features import FORWARD_BATCH, Features, patch_maps, whole_patches
from pretrain.evaluation.knn import nearest
from pretrain.evaluation.linear_segmentation import Pixels, cropped
from pretrain.evaluation.miou import (
    class_ious,
    confusion_of,
    hungarian,
    mean_iou,
    n_present,
    named_ious,
    tell_untrained,
)
from pretrain.settings import Settings, setting
from pretrain.signals import StopSignals
from pretrain.views.pixels import ADJUST

QUERIES = 8192  # patches compared at a time,
CHUNK = 16_384  # with so many of the memory: 0.5 GiB of similarities
# Comparisons of which it is found out before how long they take; fewer are minutes on a CPU
TIMED_FROM = 1e11


class InContextSettings(Settings):
    """The protocol; sources are of open-hummingbird-eval."""

    image_px: int = setting(512, "side, down to whole patches (ours; 504 with 14)", source="README", ge=1)
    k: int = setting(30, "nearest patches of the memory", source="hbird_eval.py: n_neighbors", ge=1)
    temperature: float = setting(0.02, "of the softmax over cosines", source="hbird_eval.py: beta", gt=0)
    memory_size: int = setting(10_240_000, "patches; the largest published", source="README", ge=1)
    passes: int = setting(2, "through all training images", source="README: augmentation epochs", ge=1)
    augment: bool = setting(True, "crops and colors; false (ours): whole images", source="transforms.py")
    crop_scale: tuple[PositiveFloat, PositiveFloat] = setting(
        (0.5, 2.0), "share of the area; above 1 never fits and is drawn again", source="transforms.py"
    )
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = setting(
        (3 / 4, 4 / 3), "width / height of a crop", source="image_transformations.py"
    )
    # in this order, before the crop
    jitter: float = setting(0.1, "of brightness, contrast, saturation and hue", source="transforms.py", ge=0)
    jitter_p: float = setting(0.5, "probability of each", source="transforms.py", ge=0, le=1)
    seed: int = setting(0, "of crops, colors and the choice of patches", source="ours", ge=0)
    map_px: int = setting(224, "side of the maps for figures", source="ours", ge=1)


def in_context(
    features: Features,
    train: LabelSet,
    val: LabelSet,
    settings: InContextSettings,
    n_shown: int = 0,
    signals: StopSignals | None = None,
) -> Outcome:
    """An evaluator: ``in_context_miou``, ``in_context_hungarian_miou`` and ``in_context_class_iou`` (before
    matching), in percent, ``val_classes``, and maps ``in_context`` (before matching). The search looks at signals after each
    chunk of the memory."""
    side = whole_patches(settings.image_px, features)
    n_patches = (side // features.backbone.patch_size) ** 2  # of an image
    queries, held = len(val) * n_patches, min(settings.memory_size, settings.passes * len(train) * n_patches)
    if signals is not None and queries * held > TIMED_FROM:
        seconds = search_seconds(features, settings.k) * queries * held
        bank_gb = 2 * held * (features.backbone.embed_dim + len(train.classes)) / 1e9
        what = f"in_context: {queries:,} patches compared with up to {held:,} ({bank_gb:.1f} GB)"
        tell_if_long(what, seconds, "in_context.memory_size")
    memory = remember(features, train, settings, side)
    if memory.n < settings.k:
        told = f"k={settings.k} is more than the {memory.n} patches of the training part: all of them vote"
        warnings.warn(f"in_context: {told}", stacklevel=2)
    unit = f"batches of {FORWARD_BATCH} images"
    tell = steps("in_context, search", -(-len(val) // FORWARD_BATCH), signals, unit)
    check = partial(check_signals, signals, "in_context")

    def predict(patches: Tensor) -> Tensor:
        parts = patches.flatten(0, 1).split(QUERIES)
        shares = [memory.attend(part, settings.k, settings.temperature, check) for part in parts]
        tell()
        return torch.cat(shares).unflatten(0, patches.shape[:2])

    confusion, maps = confusion_of(predict, features, val, side, side, settings.map_px, n_shown, signals)
    trained = memory.counts[: memory.n].amax(0) > 0
    tell_untrained(trained, confusion, val.classes, "in_context")
    metrics = {
        "in_context_miou": mean_iou(confusion),
        "in_context_hungarian_miou": mean_iou(confusion, hungarian(confusion)),
        "val_classes": n_present(confusion),
        "in_context_class_iou": named_ious(class_ious(confusion), val.classes),
    }
    return Outcome(metrics, {"in_context": maps})


class Memory:
    """Normalized features [M, D] float16, and pixels of each class in their patches [M, C] int16 (patches
    of at most 181 px)."""

    def __init__(self, most: int, dim: int, n_classes: int, device: torch.device) -> None:
        self.n, home = 0, device
        if device.type == "cuda" and 2 * most * (dim + n_classes) > torch.cuda.mem_get_info(device)[0] // 2:
            home = torch.device("cpu")
        self.features = torch.empty(most, dim, dtype=torch.float16, device=home)
        self.counts = torch.empty(most, n_classes, dtype=torch.int16, device=home)

    def add(self, patches: Tensor, counts: Tensor) -> None:
        """Patches [m, D] of any length and their pixels by class [m, C], at least one of each."""
        rows = slice(self.n, self.n + len(patches))
        self.features[rows] = F.normalize(patches.float(), dim=1).to(self.features)
        self.counts[rows] = counts.to(self.counts)
        self.n = rows.stop

    def nearest(self, queries: Tensor, k: int, tick: Tick = lambda: None) -> tuple[Tensor, Tensor]:
        """Cosines, descending, and places of the k nearest patches of each query [Q, D]: [Q, k] each; all
        M where k is more. ``tick`` is called after each chunk."""
        queries = F.normalize(queries.float(), dim=1)
        return nearest(queries, (part.to(queries) for part in self.features[: self.n].split(CHUNK)), k, tick)

    def attend(self, queries: Tensor, k: int, temperature: float, tick: Tick = lambda: None) -> Tensor:
        """Shares of the classes [Q, C] that queries [Q, D] take from their :meth:`nearest`."""
        cosines, places = self.nearest(queries, k, tick)
        counts = self.counts[places.to(self.counts.device)].to(cosines)  # [Q, k, C]
        weights = (cosines / temperature).softmax(1)
        return torch.einsum("qk,qkc->qc", weights, counts / counts.sum(-1, keepdim=True))


def search_seconds(features: Features, k: int) -> float:
    """How long the comparison of one patch with one of the memory takes here, from some random ones."""
    draw = torch.Generator().manual_seed(0)
    memory = Memory(CHUNK, features.backbone.embed_dim, 1, features.device)
    memory.add(torch.randn(memory.features.shape, generator=draw), torch.ones(CHUNK, 1))
    queries = torch.randn(QUERIES // 8, features.backbone.embed_dim, generator=draw).to(features.device)
    memory.nearest(queries[:8], k)  # the first one takes longer
    started = time.perf_counter()
    memory.nearest(queries, k)[0].sum().item()
    return (time.perf_counter() - started) / (CHUNK * len(queries))


def remember(features: Features, train: LabelSet, settings: InContextSettings, side: int) -> Memory:
    """The memory of the training images, seen ``passes`` times; of more images than it has places for, those
    at equal steps.

    Raises:
        UserError: no pixel is counted.
    """
    passes, patch_px, n_classes = settings.passes, features.backbone.patch_size, len(train.classes)
    train = train.first(max(1, settings.memory_size // passes))
    each = min(max(1, settings.memory_size // (passes * len(train))), (side // patch_px) ** 2)

    def item(turn: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        number, index = turn
        pixels, labels = train.read(index)
        rng = generator(settings.seed, VIEWS, number * len(train) + index)
        if settings.augment:
            pixels = jittered(rng, pixels, settings.jitter, settings.jitter_p)
            pixels, labels = cropped(rng, pixels, labels, settings.crop_scale, settings.crop_ratio)
        counts = patch_counts(maps.nearest(labels, side).numpy(), patch_px, n_classes)
        chosen = choose(rng, counts, each)
        return square(pixels, side, crop=False), torch.from_numpy(chosen), torch.from_numpy(counts[chosen])

    memory = Memory(passes * len(train) * each, features.backbone.embed_dim, n_classes, features.device)
    for items in in_batches(item, product(range(passes), range(len(train))), FORWARD_BATCH):
        images, chosen, counts = zip(*items)
        for patches in patch_maps(features, torch.stack(images)):  # once
            own = [image[places.to(image.device)] for image, places in zip(patches, chosen)]
            memory.add(torch.cat(own), torch.cat(counts))
    if not memory.n:
        raise UserError(f"{train.name}: no pixel of the training part is counted")
    return memory


def jittered(rng: np.random.Generator, pixels: Pixels, strength: float, p: float) -> Pixels:
    """Brightness, contrast and saturation by a factor in 1 +- strength, hue by a turn in +- strength, each
    with probability p."""
    for adjust, middle, u, drawn in zip(ADJUST, (1.0, 1.0, 1.0, 0.0), rng.random(4), rng.random(4)):
        if u < p:
            pixels = adjust(pixels, middle + strength * (2 * drawn - 1))
    return pixels


def patch_counts(labels: NDArray[np.int32], patch_px: int, n_classes: int) -> NDArray[np.int64]:
    """Counted pixels of each class in each patch: labels [S, S] in 0 (not counted) .. C -> [N, C],
    row-major."""
    side, width = len(labels) // patch_px, n_classes + 1
    place = np.arange(len(labels)) // patch_px
    patches = place[:, None] * side + place  # [S, S]
    counts = np.bincount((patches * width + labels).ravel(), minlength=side**2 * width)
    return counts.reshape(-1, width)[:, 1:]


def choose(rng: np.random.Generator, counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most ``most`` patches of an image with a counted pixel, those of rare classes likelier; from
    :func:`patch_counts`."""
    present = counts > 0  # [N, C]
    scores = (present @ present.sum(0)) * rng.random(len(counts))
    candidates = np.flatnonzero(present.any(1))
    return candidates[scores[candidates].argsort(kind="stable")[:most]]
