"""Files of weights: what one holds, and the one function that reads any supported source."""

from pretrain.weights.common import Checkpoint
from pretrain.weights.read import (
    backbone_name,
    check_fit,
    license_of,
    load_into,
    origin_of,
    read_checkpoint,
    source_names,
)
from pretrain.weights.sources.posfield import save_backbone

__all__ = [
    "Checkpoint",
    "backbone_name",
    "check_fit",
    "license_of",
    "load_into",
    "origin_of",
    "read_checkpoint",
]
__all__ += ["save_backbone", "source_names"]
