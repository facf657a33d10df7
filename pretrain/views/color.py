"""The colors of a view, drawn once as numbers: both data paths apply the same draw (METHOD.md 1)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from pretrain.settings import Settings, rising, setting
from pretrain.views.records import Record

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
HUE = OPERATIONS.index("hue")

NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Sigma = Annotated[float, Field(ge=1e-6)]


class ColorSettings(Settings):
    """DINOv2's photometric augmentation; probabilities by view are (first global, second global, locals)."""

    jitter: tuple[NotNegative, NotNegative, NotNegative, Annotated[float, Field(ge=0, le=0.5)]] = setting(
        (0.4, 0.4, 0.2, 0.1), "strength of brightness, contrast, saturation and hue (in turns)", "DINOv2"
    )
    jitter_p: float = setting(0.8, "probability of the jitter", "DINOv2", ge=0, le=1)
    grayscale_p: float = setting(0.2, "probability of gray", "DINOv2", ge=0, le=1)
    blur_p: tuple[Probability, Probability, Probability] = setting(
        (1.0, 0.1, 0.5), "probability of a blur: DINOv2's intention; its code really runs [0, 0.9, 0.5]"
    )
    blur_kernel_px: int = setting(9, "side of the blur's kernel in pixels, odd", "DINOv2", ge=1, le=1023)
    blur_sigma: tuple[Sigma, Sigma] = setting(
        (0.1, 2.0), "sigma of the blur in pixels, from and to", "DINOv2"
    )
    solarize_p: tuple[Probability, Probability, Probability] = setting(
        (0.0, 0.2, 0.0), "probability of solarization", "DINOv2"
    )
    solarize_threshold: int = setting(128, "levels from this one on are inverted", "DINOv2", ge=0, le=256)

    @model_validator(mode="after")
    def _check(self) -> Self:
        rising("color", self, "blur_sigma")
        if self.blur_kernel_px % 2 == 0:
            raise ValueError(
                f"color.blur_kernel_px={self.blur_kernel_px} should be odd, such as {self.blur_kernel_px + 1}"
            )
        return self


# pixels as they are
NO_COLOR = dict(jitter_p=0.0, grayscale_p=0.0, blur_p=(0.0, 0.0, 0.0), solarize_p=(0.0, 0.0, 0.0))


# One view's color, plain numbers in the order of the attributes of `Colors`
Color = tuple[bool, list[int], list[float], bool, float, bool]


@dataclass(frozen=True)
class Colors(Record):
    """The colors of a batch's views, applied in the order of the attributes.

    Attributes:
        jitter: [B, V] bool, whether the four operations below are applied at all.
        order: [B, V, 4] int64, the operation (index into ``OPERATIONS``) at each of the four places.
        factors: [B, V, 4] float32 by operation: factors of brightness, contrast, saturation, and the shift of
            the hue in turns.
        gray: [B, V] bool.
        sigma: [B, V] float32, of the blur in pixels of the crop; 0: no blur.
        solarize: [B, V] bool.
    """

    jitter: Tensor
    order: Tensor
    factors: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor

    def rows(self, image: int) -> list[Color]:
        """One image's views as plain numbers."""
        return list(zip(*(getattr(self, field.name)[image].tolist() for field in fields(self))))

    def of(self, views: slice) -> "Colors":
        """The colors of some views."""
        return self.map(lambda tensor: tensor[:, views])


def draw_colors(
    n_views: int,
    n_global: int,
    rule: ColorSettings,
    rngs: Sequence[np.random.Generator],
    plain_globals: bool = False,
) -> Colors:
    """The colors of all views of some images, each image from its own generator.

    With ``plain_globals`` the global views keep their colors; local views are as without it.
    """
    # views 0, 1 and the locals differ in blur and solarize
    kinds = np.array([2 if view >= n_global else min(view, 1) for view in range(n_views)])
    u = np.stack([rng.random((n_views, 13)) for rng in rngs])  # [B, V, 13]
    spread = np.array(rule.jitter)
    low = np.array([*np.maximum(1 - spread[:HUE], 0), -spread[HUE]])
    high = np.array([1, 1, 1, 0]) + spread
    sigma = rule.blur_sigma[0] + (rule.blur_sigma[1] - rule.blur_sigma[0]) * u[..., 8]
    changed = np.arange(n_views) >= (n_global if plain_globals else 0)
    drawn = (
        changed & (u[..., 9] < rule.jitter_p),
        u[..., :4].argsort(-1),  # of four uniform numbers: every order is equally likely
        (low + (high - low) * u[..., 4:8]).astype(np.float32),
        changed & (u[..., 10] < rule.grayscale_p),
        np.where(changed & (u[..., 11] < np.array(rule.blur_p)[kinds]), sigma, 0).astype(np.float32),
        changed & (u[..., 12] < np.array(rule.solarize_p)[kinds]),
    )
    return Colors(*(torch.from_numpy(values) for values in drawn))
