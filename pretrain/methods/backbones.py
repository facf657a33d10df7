"""The backbones that methods train: new ones, and whatever a file says that it holds."""

from typing import Any

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.methods.method import TrainSettings
from pretrain.views import CropSettings, PositionSettings
from pretrain.weights import read_checkpoint
from pretrain.weights.adapt import with_position_field


def new_backbone(
    settings: TrainSettings,
    drop_path: float = 0.0,
    positions: PositionSettings | None = None,
    mask_tokens: bool = False,
) -> ViT:
    """The network that a config asks for, from scratch or from ``backbone.weights``.

    Args:
        positions: none: a learned grid of the size of a global crop.
        mask_tokens: of content and position.
    """
    backbone = settings.backbone
    if positions is None:
        side, _ = settings.view_settings().grid
        positions = PositionSettings(encoding="standard", grid=side, interpolation="dinov2", augment=False)
    model_kwargs: dict[str, Any] = dict(
        patch_size=backbone.patch_size,
        layerscale=backbone.layer_scale_init or None,
        drop_path=drop_path,
        attention=backbone.attention,
        pos_encoding=positions.encoding,
        pos_grid=positions.grid,
        pos_interpolation=positions.interpolation,
        mask_tokens=mask_tokens,
        **own_kwargs(settings),
    )
    vit = build_backbone(backbone.name, weights=backbone.weights or None, **model_kwargs)
    vit.checkpointing = settings.step.checkpointing
    return vit


def started_backbone(settings: TrainSettings, drop_path: float, positions: PositionSettings) -> ViT:
    """The network of ``backbone.weights``, without mask tokens; its patches resampled to
    ``backbone.patch_size``.

    Its file decides all else: registers, LayerScale, activation, positions. ``positions.encoding=field``
    makes crop-tied positions of a learned grid (:mod:`pretrain.weights.adapt`), of ``positions.grid`` samples
    a side and read as ``positions.interpolation`` says; with ``standard`` they stay what they are, a grid, a
    field that is read whole, or none.

    Raises:
        UserError: no readable weights, or some that the config contradicts: another width than the name's,
            registers or blocks that the file does not have, a field of positions where it has none.
    """
    backbone = settings.backbone
    checkpoint = read_checkpoint(backbone.weights)
    if positions.encoding == "field":
        checkpoint = with_position_field(checkpoint, positions.grid, positions.interpolation)
    model_kwargs: dict[str, Any] = dict(
        patch_size=backbone.patch_size, drop_path=drop_path, attention=backbone.attention
    )
    vit = build_backbone(backbone.name, weights=checkpoint, **model_kwargs, **own_kwargs(settings))
    vit.checkpointing = settings.step.checkpointing
    return vit


def own_kwargs(settings: TrainSettings) -> dict[str, Any]:
    """Depth and registers where a config names them; 0: the name's, or the file's, own."""
    found = {key: getattr(settings.backbone, key) for key in ("depth", "n_registers")}
    return {key: value for key, value in found.items() if value}


def check_crops(crops: CropSettings, patch_size: int, least_globals: int = 1) -> None:
    """Crops are whole patches, and enough.

    Raises:
        UserError: names the key.
    """
    if crops.n_global < least_globals:
        raise UserError(
            f"crops.n_global={crops.n_global} should be at least {least_globals}: the loss compares global crops"
        )
    for name in ("global_px", "local_px"):
        side = getattr(crops, name)
        if side % patch_size and (name == "global_px" or crops.n_local):
            near = max(round(side / patch_size), 1) * patch_size
            raise UserError(
                f"crops.{name}={side} is no multiple of backbone.patch_size={patch_size}; take {near}"
            )
