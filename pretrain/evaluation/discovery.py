"""Object discovery without labels: one box an image from a frozen ViT's patch features, and how often it is
right (CorLoc).

* LOST: Siméoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels", BMVC 2021.
* TokenCut: Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized
  Cut", CVPR 2022.

Both as their public code does it, on the keys of the last attention layer, heads side by side, of images at
their own size. What the code leaves to chance is fixed here (ours): of patches that are equal, in degree or
in their eigenvector's entry, the first in reading order is taken.

Attention does not depend on a bias of the keys, so nothing holds it small: that of DINOv2, and of what was
trained from it, makes the products of all keys positive, and both methods then answer with the whole image or
at random. Where this is so :func:`usual_features` leaves the bias away (ours).

Memory: a graph of N patches takes about 5 N^2 bytes in LOST, and 40 N^2 in TokenCut: 160 MB at N = 2,000.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from pretrain.data.images import check_grid, whole
from pretrain.evaluation.features import Features

LOST_PATCHES = 100  # k: patches of low degree that may join the seed
TOKENCUT_TAU, TOKENCUT_EPS = 0.2, 1e-5  # patches more alike than tau are joined by 1, all others by eps
# Entries of an eigenvector closer than this differ by rounding: patches with the same edges have the same
# entry
TIED = 1e-6
AUTO, WITHOUT_BIAS = "auto", "keys-without-bias"
KINDS = ("keys", WITHOUT_BIAS, "queries", "values", "tokens")  # tokens: the last features
LOOKED_AT = 8  # images by which AUTO decides
ALL = 0.99  # of the pairs of patches alike: a graph that says nothing
HIT_IOU = 0.5  # CorLoc counts boxes with more than this, by the papers' rule; their code has "at least"

Grid = tuple[int, int]
Boxes = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Found(NamedTuple):
    """The object's patches [h, w] bool, and the patch that the method started from, (row, column).

    ``is_void``: there is no answer in it, for nearly all patches are alike, or none is like another.
    """

    mask: Mask
    seed: Grid
    is_void: bool


def lost(features: Tensor, grid: Grid, k: int = LOST_PATCHES) -> Found:
    """The patch that fewest others are like, and the low-degree patches like it; then all that is like these
    on the whole.

    Args:
        features: [N, D] of one image, row-major, not normalized.
        grid: (h, w), N = h * w.
        k: how many patches of lowest degree are asked to join the seed.
    """
    x = _at_home(features)
    similarity = x @ x.T  # [N, N]
    linked = similarity > 0
    degree = linked.sum(1) - linked.diagonal().long()
    order = degree.argsort(stable=True)
    seed = int(order[0])
    nearest = order[:k]
    alike = nearest[linked[seed, nearest]]
    towards = similarity[alike].sum(0) > 0  # [N]
    towards[seed] = True  # already so unless its feature is zero
    return _found(towards, seed, grid, linked)


def tokencut(features: Tensor, grid: Grid, tau: float = TOKENCUT_TAU, eps: float = TOKENCUT_EPS) -> Found:
    """The normalized cut of the graph whose edges are 1 between alike patches and ``eps`` between all others.

    The second smallest generalized eigenvector y of (D - W) y = lambda D y is split at its mean; the object
    is on the side of its largest absolute value, in the connected component that holds it.

    Args:
        features: [N, D] of one image, row-major; compared by their cosine.
        grid: (h, w), N = h * w.
        tau: cosine above which patches are alike.
    """
    x = F.normalize(_at_home(features), dim=1)
    linked = x @ x.T > tau
    weights = linked.double().masked_fill_(~linked, eps)  # [N, N]
    scale = weights.sum(1).rsqrt()  # D^-1/2
    # The smallest of D - W are the largest of W: with z = D^1/2 y, D^-1/2 W D^-1/2 z = (1 - lambda) z.
    vectors = torch.linalg.eigh(scale[:, None] * weights * scale)[1]
    vector = vectors[:, -min(2, len(vectors))] * scale
    size = vector.abs()
    seed = int((size >= size.max() * (1 - TIED)).nonzero()[0])
    above = vector > vector.mean()
    side = above if above[seed] else ~above
    side[seed] = True  # of a single patch
    return _found(side, seed, grid, linked)


METHODS: Mapping[str, Callable[[Tensor, Grid], Found]] = {"lost": lost, "tokencut": tokencut}


class Judged(NamedTuple):
    """A found box [4] in pixels of the image, its best IoU with a true one, whether that is a hit, and whether
    it is no answer: the whole image, or of a graph that says nothing."""

    box: Boxes
    iou: float
    hit: bool
    void: bool

    def row(self) -> dict[str, float | int]:
        """``x0``, ``y0``, ``x1``, ``y1``, ``iou``, ``hit`` and ``void`` (0, 1), as a table holds them."""
        corners = dict(zip(("x0", "y0", "x1", "y1"), (round(float(v), 2) for v in self.box)))
        return {**corners, "iou": round(self.iou, 4), "hit": int(self.hit), "void": int(self.void)}


def discover(
    features: Features,
    pixels: NDArray[np.uint8],
    truth: Boxes,
    methods: Sequence[str],
    of: str = "keys",
    short_px: int = 0,
) -> dict[str, Judged]:
    """One box by each method in one image, judged; a UserError for an image of too many patches.

    Args:
        features: of a frozen backbone.
        pixels: uint8 [H, W, 3].
        truth: true boxes [n, 4] in pixels.
        methods: names of :data:`METHODS`.
        of: one of :data:`KINDS`, of the last layer.
        short_px: shorter side that the image is scaled to; 0: it goes in as it is, padded with zeros to whole
            patches.
    """
    x, grid, patch_px = _described(features, pixels, of, short_px)
    found = {}
    for method in methods:
        answer, size_px = METHODS[method](x, grid), pixels.shape[:2]
        box = box_of(answer.mask, patch_px, size_px)
        best = best_iou(box, truth)
        is_whole = box.tolist() == [0, 0, size_px[1], size_px[0]]
        found[method] = Judged(box, best, best > HIT_IOU, is_whole or answer.is_void)
    return found


def best_iou(box: Boxes, truth: Boxes) -> float:
    """Of a box [4] with true ones [n, 4]."""
    return float(box_iou(torch.from_numpy(box[None]), torch.from_numpy(truth)).max())


def usual_features(
    features: Features, pictures: Sequence[NDArray[np.uint8]], short_px: int = 0
) -> tuple[str, float]:
    """What a backbone is looked at by if nobody says it: ``keys``; ``keys-without-bias`` where this bias makes
    the products of all keys positive. With the share of positive products of the keys, a mean over images."""
    shares = {}
    for of in ("keys", WITHOUT_BIAS):
        graphs = (_described(features, pixels, of, short_px)[0] for pixels in pictures)
        shares[of] = statistics.fmean(float((x @ x.T > 0).float().mean()) for x in map(_at_home, graphs))
        if shares["keys"] < ALL:
            break
    return WITHOUT_BIAS if shares.get(WITHOUT_BIAS, 1.0) < ALL else "keys", shares["keys"]


def _described(
    features: Features, pixels: NDArray[np.uint8], of: str, short_px: int
) -> tuple[Tensor, Grid, tuple[float, float]]:
    """Of an image: the features [N, D] of its patches, their grid, and a patch's height and width in pixels."""
    patch_size, as_is = features.backbone.patch_size, torch.from_numpy(pixels).permute(2, 0, 1)
    image = whole(pixels, short_px, patch_size) if short_px else as_is
    height, width = image.shape[1:]
    grid = check_grid(-(-height // patch_size), -(-width // patch_size), f"an image of {width} x {height} px")
    if of == "tokens":
        x = features.layer(image[None], -1)
    else:
        x = features.attended(image[None], of.split("-")[0], bias=of != WITHOUT_BIAS)
    return x[0], grid, (patch_size * pixels.shape[0] / height, patch_size * pixels.shape[1] / width)


def _at_home(features: Tensor) -> Tensor:
    """Where float64 and eigenvectors are to be had."""
    return features.cpu() if features.device.type == "mps" else features


def _found(mask: Tensor, seed: int, grid: Grid, linked: Tensor) -> Found:
    at, n_pairs = divmod(seed, grid[1]), len(linked) * (len(linked) - 1)
    n_alike = int(linked.sum() - linked.diagonal().sum())
    is_void = n_alike == 0 or n_alike >= ALL * n_pairs
    return Found(component(mask.cpu().unflatten(0, grid).numpy(), at), at, is_void)


def component(mask: Mask, seed: Grid) -> Mask:
    """The part of a mask [h, w] that hangs together, by edges, with ``seed`` (row, column) in it."""
    assert mask[seed]
    labels = cv2.connectedComponents(np.ascontiguousarray(mask, np.uint8), connectivity=4)[1]
    return np.asarray(labels == labels[seed])


def box_of(mask: Mask, patch_px: tuple[float, float], size_px: Grid) -> Boxes:
    """The box (x0, y0, x1, y1) in pixels around the patches of a mask [h, w], cut off at the image's border.

    Args:
        patch_px: height and width of a patch, in pixels of the image.
        size_px: (height, width) of the image; the last row and column of patches may be padded beyond it.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    y0, y1 = rows[0] * patch_px[0], min((rows[-1] + 1) * patch_px[0], size_px[0])
    x0, x1 = columns[0] * patch_px[1], min((columns[-1] + 1) * patch_px[1], size_px[1])
    return np.array([x0, y0, x1, y1], np.float64)
