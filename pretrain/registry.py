"""The table of backbones: the one place where pre-training, det_plugin and seg_plugin look a name up."""

from fvcore.common.registry import Registry

BACKBONES = Registry("BACKBONES")
BACKBONES.__doc__ = (
    """Name -> function(**flags) -> ViT. Backbones register themselves in :mod:`pretrain.backbones`."""
)
