"""``build_backbone`` makes a backbone from a name and a checkpoint, for all three packages."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pretrain.backbones  # noqa: F401  (registers the names)
from pretrain.backbones.vit import SIZES, ViT, size_name
from pretrain.errors import UserError
from pretrain.registry import BACKBONES
from pretrain.settings import Settings, setting
from pretrain.weights import Checkpoint, backbone_name, load_into, read_checkpoint
from pretrain.weights.adapt import with_patch_size

PROTOCOL_PATCH_PX = 16
# These are settings of a run, not of a network: an override cannot contradict the file.
RUN_KWARGS = ("drop_path", "attention", "mask_tokens", "pos_interpolation", "layerscale")


class BackboneSettings(Settings):
    """The network of a pre-training run."""

    name: str = setting("vit_small_patch16", "registry name", source="appendix B.1")
    weights: str = setting("", "start from this checkpoint instead of from scratch", in_recipe=False)
    patch_size: int = setting(16, "side of a patch in pixels", source="appendix B.1", ge=1, le=1024)
    depth: int = setting(0, "blocks; 0: the name's own", ge=0, le=1024)
    n_registers: int = setting(0, "register tokens; 0: the name's own", ge=0, le=1024)
    layer_scale_init: float = setting(
        1.0e-5, "initial value of LayerScale; 0: none; weights have their own", source="DINOv2", ge=0
    )
    drop_path: float = setting(
        0.1, "stochastic depth of the last block, linear from 0", source="Table 6", ge=0, le=1 - 1e-9
    )
    attention: Literal["auto", "sdpa", "xformers"] = setting("auto", "implementation", in_recipe=False)


def backbone_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(name for name, _ in BACKBONES)


def build_backbone(
    name: str | Path | None = None,
    weights: str | Path | Checkpoint | None = None,
    *,
    source: str | None = None,
    subnet: str | None = None,
    **overrides: Any,
) -> ViT:
    """Build a backbone, with a checkpoint's weights if one is given.

    Args:
        name: ``vit_SIZE_patch16``, ``..._reg4`` (:data:`pretrain.backbones.vit.SIZES`); None where the weights
            say it, and then the weights may stand in its place.
        weights: any supported checkpoint (:mod:`pretrain.weights`), or one that is read already. It
            determines the network (registers, LayerScale, position encoding, grid, depth, ...).
        source: whose file it is, as :func:`pretrain.weights.read_checkpoint` takes it; None: the file tells it.
        subnet: ``teacher`` or ``student`` of a file that holds both; None: the one that is usually taken.
        overrides: arguments of :class:`ViT` (``patch_size``, ``drop_path``, ``attention``, ``pos_encoding``,
            ...). Another ``patch_size`` than the file's resamples the patch projection
            (:mod:`pretrain.weights.adapt`).

    Returns:
        the ViT, in training mode, on the CPU.

    Raises:
        UserError: a name or option is unknown; the checkpoint has another architecture; names a missing or
            left-over tensor.
    """
    if weights is None and name is not None and name not in BACKBONES and Path(name).exists():
        name, weights = None, name
    checkpoint = None
    if weights is not None:
        checkpoint = weights if isinstance(weights, Checkpoint) else read_checkpoint(weights, source, subnet)
    asked, name = name, backbone_name(None if name is None else str(name), checkpoint)
    if name not in BACKBONES:
        known = ", ".join(backbone_names())
        if asked is None and checkpoint is not None:
            told = f"says that it is a {name!r:.60}, which is not registered"
            raise UserError(f"weights: {checkpoint.path} {told}; there are {known}")
        raise UserError(f"backbone: {name!r} is not registered, and no file of weights; there are {known}")
    model_kwargs = dict(overrides)
    if checkpoint is not None:
        if "patch_size" in overrides:
            checkpoint = with_patch_size(checkpoint, overrides["patch_size"])
        model_kwargs = _merge(name, checkpoint, overrides)
    try:
        model: ViT = BACKBONES.get(name)(**model_kwargs)
    except (TypeError, ValueError) as error:
        where = f"backbone {name}" if checkpoint is None else f"weights: {checkpoint.path}, as {name}"
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    if checkpoint is not None:
        load_into(model, checkpoint)
    return model


def build_for_fine_tuning(name: str, weights: str | Path | None = None, **model_kwargs: Any) -> ViT:
    """:func:`build_backbone` for the two protocols, whose patches have 16 px: other files are resampled, unless
    ``patch_size`` is given. Norms of special tokens alone are frozen: the protocols read the patches, and
    DistributedDataParallel stops where a parameter gets no gradient."""
    vit = build_backbone(name, weights, **{"patch_size": PROTOCOL_PATCH_PX, **model_kwargs})
    for norm in (vit.cls_norm, vit.local_cls_norm):
        if norm is not None:
            norm.requires_grad_(False)
    return vit


def network_kwargs(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`build_backbone` that change the network and not only how its file is read."""
    return {key: value for key, value in model_kwargs.items() if key != "source"}


def _merge(name: str, checkpoint: Checkpoint, overrides: dict[str, Any]) -> dict[str, Any]:
    """The file's arguments, updated with the run's own. An override that contradicts the file is an error."""
    model_kwargs = {**checkpoint.model_kwargs, "mask_tokens": False}
    usual = SIZES.get(size_name(name) or "", model_kwargs)
    width, depth, registers = (model_kwargs.get(key, 0) for key in ("embed_dim", "depth", "n_registers"))
    if width != usual["embed_dim"]:
        own = f"{name} is {usual['embed_dim']} wide"
        raise UserError(f"weights: {checkpoint.path} is {width} wide, but {own}")
    named = re.search(r"_reg(\d+)$", name)  # a plain name allows any number
    if named and "n_registers" not in overrides and int(named[1]) != registers:
        raise UserError(f"weights: {checkpoint.path} has {registers} registers, but {name} has {named[1]}")
    if checkpoint.depth_is_counted and "depth" not in overrides and depth != usual["depth"]:
        told = f"{checkpoint.path} has {depth} blocks where {name} has {usual['depth']}"
        warnings.warn(f"weights: {told}: blocks may be missing", stacklevel=3)
    for key, value in overrides.items():
        if key in model_kwargs and key not in RUN_KWARGS and model_kwargs[key] != value:
            made = f"{checkpoint.path} was made with {key}={model_kwargs[key]!r}"
            raise UserError(f"weights: {made}, but {key}={value!r} is asked for")
    return {**model_kwargs, **overrides}
