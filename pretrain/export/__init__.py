"""A backbone as a file for others: programs that need none of our code, and the formats of other libraries."""

from pretrain.export.card import model_card
from pretrain.export.checked import FORMATS, TOLERANCE, export, largest_difference
from pretrain.export.converted import convert
from pretrain.export.fixed_size import FixedSizeViT

__all__ = ["FORMATS", "TOLERANCE", "FixedSizeViT", "convert", "export", "largest_difference", "model_card"]
