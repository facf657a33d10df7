"""The sources: whose file it is, and what to take from it. One file a family; of equal evidence the first is taken."""

from pretrain.weights.sources import posfield, timm
from pretrain.weights.sources.source import Evidence, Source

SOURCES: tuple[Source, ...] = (*posfield.SOURCES, *timm.SOURCES)

__all__ = ["SOURCES", "Evidence", "Source"]
