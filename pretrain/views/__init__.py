"""Views: where the crops are, which patches are masked, and what the pixels look like."""

from dataclasses import dataclass

from pretrain.views.boxes import CropSettings, PositionSettings, Views, draw_views
from pretrain.views.color import Colors, ColorSettings, draw_colors
from pretrain.views.masks import Masks, MaskSettings, draw_masks

__all__ = [
    "ColorSettings",
    "Colors",
    "CropSettings",
    "MaskSettings",
    "Masks",
    "PositionSettings",
    "ViewSettings",
    "Views",
    "draw_colors",
    "draw_masks",
    "draw_views",
]


@dataclass(frozen=True)
class ViewSettings:
    """How the loader makes the views of a method.

    Attributes:
        crops, color: of the crops.
        positions: of the views' position boxes; ``None``: plain ones, which no backbone of the method reads.
        masks: of the global crops; ``None``: nothing is masked.
        patch_size: in pixels.
        tied: a view reads the positions of its crop; else those of a whole image, as at inference.
    """

    crops: CropSettings
    color: ColorSettings
    positions: PositionSettings | None
    masks: MaskSettings | None
    patch_size: int
    tied: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): patches of a global crop."""
        side = self.crops.global_px // self.patch_size
        return side, side
