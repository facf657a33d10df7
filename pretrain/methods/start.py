"""The backbone that a post-training starts from: whatever its file says it is."""

from omegaconf import DictConfig

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError


def build_started_backbone(config: DictConfig, drop_path: float) -> ViT:
    """The network of ``backbone.weights``, without mask tokens; its patches resampled to ``backbone.patch_size``.

    Raises:
        UserError: no weights, or weights that the config contradicts.
    """
    backbone = config.backbone
    if not backbone.weights:
        raise UserError("backbone.weights: a post-training (run.algorithm=dense) starts from a backbone; none is given")
    flags = dict(patch_size=backbone.patch_size, drop_path=drop_path, attention=backbone.attention)
    for key in ("depth", "n_registers"):
        if backbone[key]:  # 0: the file's own
            flags[key] = backbone[key]
    return build_backbone(backbone.name, weights=backbone.weights, **flags)
