"""Export a backbone: as a program that needs none of our code, or in the format of another library."""

from pretrain.export.card import model_card
from pretrain.export.checked import FORMATS, TOLERANCE, export, largest_difference
from pretrain.export.converted import convert
from pretrain.export.fixed_size import FixedSizeViT

__all__ = ["FORMATS", "TOLERANCE", "FixedSizeViT", "convert", "export", "largest_difference", "model_card"]
