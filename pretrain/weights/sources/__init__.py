"""The sources of weights, one file for each family. Of equal matches the first source is taken."""

from pretrain.weights.common import Source
from pretrain.weights.sources import (
    dino,
    dinov2,
    dinov3,
    huggingface,
    loca,
    mae,
    posfield,
    timm,
    tuned,
    unsupported,
)

SOURCES: tuple[Source, ...] = (
    *posfield.SOURCES,
    *unsupported.SOURCES,
    *mae.SOURCES,
    *loca.SOURCES,
    *huggingface.SOURCES,
    *dinov3.SOURCES,
    *dinov2.SOURCES,
    *dino.PATCHWISE,
    *timm.SOURCES,  # before those whose flat files have its very layout: it makes no claim about the method
    *tuned.SOURCES,
    *dino.SOURCES,
)
