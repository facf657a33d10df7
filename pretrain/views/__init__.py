"""Views: where the crops are, which patches are masked, and what the pixels look like."""

from pretrain.views.boxes import CropRule, PositionRule, Views, draw_views
from pretrain.views.colour import ColourRule, Colours, draw_colours
from pretrain.views.masks import MaskRule, Masks, draw_masks

__all__ = [
    "ColourRule",
    "Colours",
    "CropRule",
    "MaskRule",
    "Masks",
    "PositionRule",
    "Views",
    "draw_colours",
    "draw_masks",
    "draw_views",
]
