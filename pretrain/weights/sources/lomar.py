"""(being written)"""

from pretrain.weights.sources.source import Source

SOURCES: tuple[Source, ...] = ()
