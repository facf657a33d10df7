"""The sources of weights, one file for each family. Of equal matches the first source is taken."""

from pretrain.weights.sources import (
    dino,
    dinov2,
    huggingface,
    loca,
    lomar,
    mae,
    patchwise,
    posfield,
    timm,
    tuned,
    unsupported,
)
from pretrain.weights.sources.source import Match, Source

SOURCES: tuple[Source, ...] = (
    *posfield.SOURCES,
    *unsupported.SOURCES,
    *lomar.SOURCES,
    *mae.SOURCES,
    *loca.SOURCES,
    *huggingface.SOURCES,
    *dinov2.SOURCES,
    *patchwise.SOURCES,
    *timm.SOURCES,  # before those whose flat files have its very layout: it makes no claim about the method
    *tuned.SOURCES,
    *dino.SOURCES,
)

__all__ = ["SOURCES", "Match", "Source"]
