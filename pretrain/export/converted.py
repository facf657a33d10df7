"""Our own file: convert any supported weights to ``backbone.safetensors``, with all arguments and the origin in
the metadata; or export plain tensors under timm's names, with no field and positions on one grid."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import ensure
from pretrain.export.fixed_size import (
    FixedSizeViT,
    Run,
    Size,
    Usage,
    plain_state,
    registered_name,
    whole_patches,
)
from pretrain.results.provenance import file_hash
from pretrain.weights import backbone_name, read_checkpoint, save_backbone


def build_whole(
    weights: str | Path,
    *,
    name: str | None = None,
    source: str | None = None,
    subnet: str | None = None,
    patch_size: int | None = None,
) -> tuple[ViT, dict[str, Any]]:
    """The network of any supported weights, with its mask tokens if it has any, and its provenance.

    Args:
        name, source, subnet, patch_size: those of :func:`pretrain.build.build_backbone`; None: as the file
            says.

    Returns:
        the ViT, and its provenance with the hash of the file (for a converted file: of the original).

    Raises:
        UserError: all that :func:`pretrain.build.build_backbone` raises.
    """
    found = read_checkpoint(weights, source, subnet)
    model_kwargs: dict[str, Any] = {} if patch_size is None else {"patch_size": patch_size}
    if found.model_kwargs.get("mask_tokens"):
        model_kwargs["mask_tokens"] = True  # pre-training goes on with them, and the position probe asks them
    vit = build_backbone(backbone_name(name, found), found, **model_kwargs)
    told: dict[str, Any] = {"weights_hash": file_hash(weights), **found.provenance}
    if subnet is not None:
        told["subnet"] = subnet
    if vit.patch_size != found.model_kwargs["patch_size"]:
        told["patch_size_before"] = found.model_kwargs["patch_size"]
    return vit, told


def write_whole(vit: ViT, output: str | Path, provenance: Mapping[str, Any]) -> Path:
    """Write a network as a file of ours, replaced atomically.

    Raises:
        UserError: the output has another suffix; no registered backbone has this width.
    """
    is_ours = Path(output).suffix == ".safetensors"
    ensure(is_ours, f"output: a converted file ends in .safetensors, {output} does not")
    name, own = registered_name(vit), vit.model_kwargs
    return save_backbone(output, vit.state_dict(), name=name, model_kwargs=own, provenance=provenance)


def convert(
    weights: str | Path,
    output: str | Path,
    *,
    method: str | None = None,
    effective_epochs: float | None = None,
    **asked: Any,
) -> Path:
    """Write ``weights`` as a file that every part of posfield reads without further arguments.

    Args:
        output: ``*.safetensors``; it is replaced atomically.
        method, effective_epochs: for tables; None: what the source says.
        asked: ``name``, ``source``, ``subnet``, ``patch_size``, see :func:`build_whole`.

    Raises:
        UserError: all that :func:`build_whole` and :func:`write_whole` raise.
    """
    vit, told = build_whole(weights, **asked)
    return write_whole(vit, output, told | given(method, effective_epochs))


def given(method: str | None, effective_epochs: float | None) -> dict[str, Any]:
    """The entries that replace those of the file's provenance.

    Raises:
        UserError: the epochs are not a positive number.
    """
    is_positive = effective_epochs is None or 0 < effective_epochs < math.inf
    ensure(is_positive, f"effective_epochs: {effective_epochs} is no positive number")
    told = {"method": method, "effective_epochs": effective_epochs}
    return {key: value for key, value in told.items() if value is not None}


def export_safetensors(vit: ViT, size: Size, path: Path, provenance: Mapping[str, Any]) -> Run:
    """``*.safetensors``. posfield builds the network from it with ``weights=path`` alone.

    Raises:
        UserError: the grid is not square, as a ViT's learned one is; see :func:`whole_patches`.
    """
    name, model_kwargs = registered_name(vit), {**vit.model_kwargs, "mask_tokens": False}
    model_kwargs.pop("local_cls_norm", None)
    has_positions = vit.pos_encoding not in ("none", "rotary")
    square = "a ViT learns a square grid; give one side, or take --format timm" if has_positions else ""
    side, state = whole_patches(vit, size, square)[0], plain_state(vit, size)
    if vit.qkv_bias == "none":
        state = {key: value for key, value in state.items() if not key.endswith("qkv.bias")}
    if has_positions:
        interpolation = "bicubic" if vit.pos_encoding == "field" else vit.pos_interpolation
        model_kwargs |= {"pos_encoding": "standard", "pos_grid": side, "pos_interpolation": interpolation}
    else:
        state.pop("pos_embed", None)
    told = {"source": "posfield", **provenance}
    save_backbone(path, state, name=name, model_kwargs=model_kwargs, provenance=told)
    return FixedSizeViT(build_backbone(name, path).eval(), size)


def use_safetensors(vit: ViT, size: Size, path: str) -> Usage:
    """How to use it."""
    code = f"""from pretrain.build import build_backbone

model = build_backbone({registered_name(vit)!r}, weights={path!r}).eval()
cls, registers, patches = model(image)  # [B, D], [B, R, D], [B, N, D]"""
    note = "Tensors under timm's names; the flags of the network are in the file's metadata, as JSON under `flags`."
    return Usage("posfield", code, (note,))
