"""The photometric part of a view: drawn once as numbers, so that every data path applies the same distribution (METHOD.md 1)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ColourRule:
    """DINOv2's photometric augmentation; probabilities by view are (first global, second global, locals)."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_kernel_px: int = 9
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: tuple[float, float, float] = (0.0, 0.2, 0.0)
    solarize_threshold: int = 128


@dataclass(frozen=True)
class Colour:
    """One view's draw. ``order`` is the order of brightness (0), contrast (1), saturation (2) and hue (3)."""

    order: tuple[int, ...] | None  # none: no jitter
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: bool
    blur_sigma: float | None  # none: no blur
    solarize: bool


def draw_colour(view: int, n_global: int, rule: ColourRule, rng: np.random.Generator) -> Colour:
    """The colour of one view; views 0, 1 and the locals differ in blur and solarize."""
    kind = 2 if view >= n_global else min(view, 1)
    brightness, contrast, saturation, hue = rule.jitter
    order = tuple(int(i) for i in rng.permutation(4)) if rng.uniform() < rule.jitter_p else None

    def factor(spread: float) -> float:
        return rng.uniform(max(0.0, 1 - spread), 1 + spread)

    return Colour(
        order,
        brightness=factor(brightness),
        contrast=factor(contrast),
        saturation=factor(saturation),
        hue=rng.uniform(-hue, hue),
        grey=bool(rng.uniform() < rule.grey_p),
        blur_sigma=rng.uniform(*rule.blur_sigma) if rng.uniform() < rule.blur_p[kind] else None,
        solarize=bool(rng.uniform() < rule.solarize_p[kind]),
    )
