"""The backbones that methods train: new ones, and whatever a file says that it holds."""

import warnings
from typing import Any

from pretrain.backbones.position import started_field
from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.methods.method import TrainSettings
from pretrain.views import CropSettings, PositionSettings
from pretrain.weights import Checkpoint, read_checkpoint
from pretrain.weights.adapt import with_position_field


def new_backbone(
    settings: TrainSettings,
    drop_path: float = 0.0,
    positions: PositionSettings | None = None,
    mask_tokens: bool = False,
) -> ViT:
    """The network that a config asks for, from scratch or from ``backbone.weights``, whose file then decides about
    LayerScale. With crop-tied positions its field is taken as it is, and a learned grid becomes one (:func:`_read`);
    a new field starts as ``positions.init`` says.

    Args:
        positions: none: a learned grid of the size of a global crop.
        mask_tokens: of content and position.
    """
    if positions is None:
        side, _ = settings.view_settings().grid
        positions = PositionSettings(encoding="standard", grid=side, interpolation="dinov2", augment=False)
    how = dict[str, Any](drop_path=drop_path, mask_tokens=mask_tokens, pos_encoding=positions.encoding)
    is_field, is_rotary = positions.encoding == "field", positions.encoding == "rotary"
    grid = {"pos_grid": positions.grid, "pos_interpolation": positions.interpolation} if not is_rotary else {}
    if settings.backbone.weights:
        own = {} if is_field else grid  # a field of the file's stays as it is
        vit = _built(settings, _read(settings, positions), **how, **own)
    else:
        how |= {"qkv_bias": "no_key", "ln_eps": 1e-5} if is_rotary else {}  # DINOv3's network
        vit = _built(settings, None, **how, **grid, layerscale=settings.backbone.layer_scale_init or None)
        if is_field:
            start = positions.init, positions.init_grid, positions.init_scale
            # into its memory: FSDP2 takes contiguous parameters alone
            vit.pos_field.data.copy_(started_field(vit.pos_field.data, *start))
    return _prepared(vit, positions)


def started_backbone(settings: TrainSettings, drop_path: float, positions: PositionSettings) -> ViT:
    """The network of ``backbone.weights``, without mask tokens, its patches of ``backbone.patch_size``.

    Its file decides all else: registers, LayerScale, activation, positions, unless ``positions.encoding=field`` makes
    crop-tied ones of a learned grid. With ``standard`` they stay what they are: a grid, a field or rotary ones that are
    read whole, or none.

    Raises:
        UserError: no readable weights, or some that the config contradicts: another width than the name's,
            registers or blocks that the file does not have, a field of positions where it has none.
    """
    return _prepared(_built(settings, _read(settings, positions), drop_path=drop_path), positions)


def _prepared(vit: ViT, positions: PositionSettings) -> ViT:
    """The network, whose crop-tied field learns or does not (one that does not has no gradient and no decay), and whose
    untied rotary positions are rescaled in training."""
    if positions.encoding == "field":
        vit.pos_field.requires_grad_(positions.learnable)
    if positions.encoding == "rotary" and not positions.tied:
        vit.rescale = positions.rescale
    return vit


def _read(settings: TrainSettings, positions: PositionSettings) -> Checkpoint:
    """``backbone.weights``. ``positions.encoding=field`` makes a field of a learned grid (:mod:`pretrain.weights.adapt`),
    of ``positions.grid`` samples a side and read as ``positions.interpolation`` says. A file's positions stay."""
    checkpoint = read_checkpoint(settings.backbone.weights)
    if positions.encoding == "field":
        if positions.init != "normal":
            told = "has no effect with backbone.weights, whose positions stay"
            warnings.warn(f"config: positions.init={positions.init} {told}", stacklevel=2)
        return with_position_field(checkpoint, positions.grid, positions.interpolation)
    own = checkpoint.model_kwargs.get("pos_encoding", "standard")
    if positions.encoding == "rotary" and own != "rotary":
        told = "has no rotary positions; take positions.encoding=field (crop-tied) or standard, or weights of DINOv3"
        raise UserError(f"backbone.weights: {settings.backbone.weights} {told}")
    return checkpoint


def _built(settings: TrainSettings, weights: Checkpoint | None, **model_kwargs: Any) -> ViT:
    """A backbone of the config's sizes; depth and registers 0: the name's, or the file's, own."""
    for key in ("patch_size", "attention", "depth", "n_registers"):
        if value := getattr(settings.backbone, key):
            model_kwargs[key] = value
    vit = build_backbone(settings.backbone.name, weights=weights, **model_kwargs)
    vit.checkpointing = settings.step.checkpointing
    return vit


def check_crops(crops: CropSettings, patch_size: int, least_globals: int = 1) -> None:
    """Crops are whole patches, and enough.

    Raises:
        UserError: names the key.
    """
    if crops.n_global < least_globals:
        few = f"crops.n_global={crops.n_global} should be at least {least_globals}"
        raise UserError(f"{few}: the loss compares global crops")
    for name in ("global_px", "local_px"):
        side = getattr(crops, name)
        if side % patch_size and (name == "global_px" or crops.n_local):
            near, of = max(round(side / patch_size), 1) * patch_size, f"backbone.patch_size={patch_size}"
            raise UserError(f"crops.{name}={side} is no multiple of {of}; take {near}")
