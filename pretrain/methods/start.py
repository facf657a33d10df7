"""The backbone that a post-training starts from: whatever its file says it is."""

from omegaconf import DictConfig

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.weights import read_checkpoint
from pretrain.weights.field import with_position_field


def build_started_backbone(config: DictConfig, drop_path: float) -> ViT:
    """The network of ``backbone.weights``, without mask tokens; its patches resampled to ``backbone.patch_size``.

    Its file decides all else: registers, LayerScale, activation, positions. ``positions.encoding=field`` makes crop-tied positions
    of a learned grid (:mod:`pretrain.weights.field`), of ``positions.grid`` samples a side and read as ``positions.interpolation``
    says; with ``standard`` they stay what they are, a grid, a field that is read whole, or none.

    Raises:
        UserError: no readable weights, or some that the config contradicts: another width than the name's, registers or blocks that
            the file does not have, a field of positions where it has none.
    """
    backbone, positions = config.backbone, config.positions
    checkpoint = read_checkpoint(backbone.weights)
    if positions.encoding == "field":
        checkpoint = with_position_field(checkpoint, positions.grid, positions.interpolation)
    flags = dict(patch_size=backbone.patch_size, drop_path=drop_path, attention=backbone.attention)
    for key in ("depth", "n_registers"):
        if backbone[key]:  # 0: the file's own
            flags[key] = backbone[key]
    return build_backbone(backbone.name, weights=checkpoint, **flags)
