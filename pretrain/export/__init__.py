"""A backbone as a file for others: programs that need none of our code, and the formats of other libraries."""

from pretrain.export.programs import FORMATS, TOLERANCE, FixedSizeViT, export, largest_difference

__all__ = ["FORMATS", "TOLERANCE", "FixedSizeViT", "export", "largest_difference"]
