"""Export as plain tensors under timm's names: no field, positions on one grid, all arguments in the
metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.export.fixed_size import (
    FixedSizeViT,
    Run,
    Size,
    Usage,
    plain_state,
    registered_name,
    whole_patches,
)
from pretrain.weights import save_backbone


def export_safetensors(vit: ViT, size: Size, path: Path, provenance: Mapping[str, Any]) -> Run:
    """``*.safetensors``. posfield builds the network from it with ``weights=path`` alone.

    Raises:
        UserError: the grid is not square, as a ViT's learned one is; see :func:`whole_patches`.
    """
    name = registered_name(vit)
    height, width = whole_patches(vit, size)
    state, model_kwargs = plain_state(vit, size), {**vit.model_kwargs, "mask_tokens": False}
    if vit.pos_encoding == "none":
        del state["pos_embed"]
    elif height != width:
        raise UserError(
            f"size: {size[0]} x {size[1]} px: a ViT learns a square grid; give one side, or take --format timm"
        )
    else:
        interpolation = "bicubic" if vit.pos_encoding == "field" else vit.pos_interpolation
        model_kwargs |= {"pos_encoding": "standard", "pos_grid": height, "pos_interpolation": interpolation}
    save_backbone(
        path, state, name=name, model_kwargs=model_kwargs, provenance={"source": "posfield", **provenance}
    )
    return FixedSizeViT(build_backbone(name, path).eval(), size)


def use_safetensors(vit: ViT, size: Size, path: str) -> Usage:
    """See :class:`Usage`."""
    code = f"""from pretrain.build import build_backbone

model = build_backbone({registered_name(vit)!r}, weights={path!r}).eval()
cls, registers, patches = model(image)  # [B, D], [B, R, D], [B, N, D]"""
    note = "Tensors under timm's names; the flags of the network are in the file's metadata, as JSON under `flags`."
    return Usage("posfield", code, (note,))
