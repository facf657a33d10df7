"""The backbones. Importing this package registers them in :data:`pretrain.registry.BACKBONES`."""

from pretrain.backbones.vit import ViT

__all__ = ["ViT"]
