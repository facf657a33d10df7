"""The position probe layer by layer (METHOD.md 8): where in the network does a patch's place become known, or
get lost?

The read-out of :mod:`pretrain.evaluation.position_probe`, on the features after the embedding, after each
block and after the final
norm: of the patches whose position was hidden, and, for comparison, of the others of the same images, whose
    position was given.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pretrain.evaluation.features import Features, layer_names
from pretrain.evaluation.position_probe import PlaceReader, Score, centers, draw_masks

PATCHES = ("hidden", "given")  # which patches are read: those whose position was hidden, those that had it


@dataclass(frozen=True)
class LayerScore:
    """A layer's :class:`Score` in every draw of the masks; ``patches`` is one of :data:`PATCHES`."""

    patches: str
    layer: int
    name: str
    scores: tuple[Score, ...]

    def mean(self, field: str) -> float:
        """Mean over the draws of ``error``, ``chance`` or ``r2``."""
        return math.fsum(getattr(score, field) for score in self.scores) / len(self.scores)

    def std(self, field: str) -> float:
        """Sample standard deviation over the draws; 0 for a single one."""
        mean, n = self.mean(field), len(self.scores)
        return math.sqrt(
            math.fsum((getattr(score, field) - mean) ** 2 for score in self.scores) / max(n - 1, 1)
        )


def position_layers(
    features: Features,
    images: Tensor,
    draws: int = 3,
    shape: str = "cross",
    tell: Callable[[int], None] = lambda n: None,
) -> list[LayerScore]:
    """Probe every layer, fitted on every second image and judged on the others, for several draws of the
    masks.

    Draw 0 has the masks of :class:`pretrain.evaluation.position_probe.PositionProbe`, whose numbers the last
    layer's are. The images go through the backbone once a draw. Memory: two D x D float64 matrices a layer
    and the features of one layer at a time.

    Args:
        features: of a backbone that holds a position mask token (see
            :func:`pretrain.evaluation.position_probe.hide_with`), frozen.
        images: uint8 [n, 3, H, W], whole images, both sides multiples of the patch size.
        shape: of the masks, ``cross`` | ``box``.
        tell: is called after each batch with its number of images.

    Returns:
        all layers of the hidden patches, then all of the others.
    """
    patch_size = features.backbone.patch_size
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    by_draw = []
    for draw in range(draws):
        masks = draw_masks(len(images), grid, shape, draw)
        by_draw.append(_one_draw(features, images, masks, grid, tell))
    names = layer_names(features.backbone)
    return [
        LayerScore(patches, layer, names[layer], tuple(readers[which][layer].score() for readers in by_draw))
        for which, patches in enumerate(PATCHES)
        for layer in range(len(names))
    ]


def _one_draw(
    features: Features, images: Tensor, masks: Tensor, grid: tuple[int, int], tell: Callable[[int], None]
) -> list[list[PlaceReader]]:
    """Readers of the hidden and of the given patches, one a layer."""
    dim, device, places = features.backbone.embed_dim, features.device, centers(*grid)
    readers = [[PlaceReader(dim, device) for _ in layer_names(features.backbone)] for _ in PATCHES]
    last = len(readers[0]) - 1
    for half, learn in ((slice(0, None, 2), PlaceReader.fit), (slice(1, None, 2), PlaceReader.judge)):
        hidden = masks[half]

        def visit(part: slice, layer: int, patches: Tensor, hidden: Tensor = hidden, learn=learn) -> None:  # type: ignore[no-untyped-def]
            mask = hidden[part]
            for row, chosen in zip(readers, (mask, ~mask)):
                learn(row[layer], patches[chosen.to(device)], places.expand(len(chosen), -1, -1)[chosen])
            if layer == last:
                tell(len(patches))

        features.visit(images[half], visit, hidden)
    return readers


def csv_rows(label: str, hidden_by: str, scores: Sequence[LayerScore]) -> Iterator[dict[str, str]]:
    """One row a layer and kind of patches: mean and standard deviation of the error (image units) and of
    R^2, and chance."""
    for score in scores:
        numbers = {
            "error": score.mean("error"),
            "error_std": score.std("error"),
            "chance": score.mean("chance"),
            "r2": score.mean("r2"),
            "r2_std": score.std("r2"),
        }
        texts = {name: f"{value:.6f}" for name, value in numbers.items()}
        place = {
            "layer": str(score.layer),
            "after": score.name,
            "patches": score.patches,
            "hidden_by": hidden_by,
        }
        yield {"checkpoint": label, **place, "draws": str(len(score.scores)), **texts}


def metrics(scores: Sequence[LayerScore]) -> dict[str, float]:
    """What ``result.json`` says: the last layer's numbers, and the best layer's."""
    hidden = [score for score in scores if score.patches == PATCHES[0]]
    last, best = hidden[-1], max(hidden, key=lambda score: score.mean("r2"))
    found = {f"position_{field}": last.mean(field) for field in Score._fields}
    deviations = {f"position_{field}_std": last.std(field) for field in ("error", "r2")}
    given = scores[-1].mean("r2")
    return {
        **found,
        **deviations,
        "position_best_r2": best.mean("r2"),
        "position_best_layer": best.layer,
        "given_r2": given,
    }
