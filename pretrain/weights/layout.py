"""What the sources share: prefixes of keys, and the flags of a plain ViT read off the shapes of its tensors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint

HEAD_DIM = 64  # of every public ViT of these sizes
WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
POSITION_MARKS = ("pos_embed", "pos_field")


def strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose key begins with ``prefix``, without it; the others are left out."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def without(state: Mapping[str, Tensor], *starts: str) -> dict[str, Tensor]:
    """All tensors but those whose key begins with one of ``starts``."""
    return {key: value for key, value in state.items() if not key.startswith(starts)}


def depth_of(state: Mapping[str, Tensor]) -> int:
    """Number of blocks, by the highest ``blocks.N``; 0 without any."""
    numbers = [key.split(".")[1] for key in state if key.startswith("blocks.")]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def registry_name(width: int, n_registers: int = 0) -> str | None:
    """``vit_small_patch16``, ``..._reg4``: the name whose sizes the shapes are of, if one is registered."""
    if width not in WIDTHS:
        return None
    return f"vit_{WIDTHS[width]}_patch16" + ("_reg4" if n_registers == 4 else "")


def plain_vit(path: Path, state: Mapping[str, Tensor], source: str, method: str, **flags: Any) -> Checkpoint:
    """A checkpoint from a state dict under our names; flags that the shapes tell are read off them.

    Args:
        state: ``patch_embed.proj.*``, ``blocks.*``; and if there are any ``norm.*``, ``ls1/2.gamma``, ``cls_token`` [1, 1, D],
            ``reg_token`` [1, R, D], ``pos_embed`` [1, (1 +) G * G, D] with a row for [CLS] exactly when there is a ``cls_token``.
        source, method: for the provenance.
        flags: what shapes do not tell (``gelu``, ``ln_eps``, ``pos_interpolation``, ...), or overrides of what they do.

    Raises:
        UserError: tensors that no ViT can do without are absent, or have shapes that fit no ViT; by name.
    """
    needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    if absent := [key for key in needed if key not in state]:
        raise UserError(f"weights: {path}, read as {source}: no tensor {', '.join(absent)}")
    kernel = state["patch_embed.proj.weight"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise UserError(f"weights: {path}, read as {source}: patch_embed.proj.weight is {tuple(kernel.shape)}, no square patch")
    width, has_cls = kernel.shape[0], "cls_token" in state
    n_registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    found: dict[str, Any] = dict(
        embed_dim=width,
        depth=depth_of(state),
        num_heads=width // HEAD_DIM,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        patch_size=kernel.shape[2],
        n_registers=n_registers,
        has_cls=has_cls,
        final_norm="norm.weight" in state,
        layerscale=1e-5 if "blocks.0.ls1.gamma" in state else None,
        pos_encoding="standard" if "pos_embed" in state else "none",
        mask_tokens="mask_token" in state and "pos_mask_token" in state,
    )
    if "pos_embed" in state:
        rows = state["pos_embed"].shape[1] - has_cls
        if math.isqrt(rows) ** 2 != rows:
            what = "1 + a square grid" if has_cls else "a square grid"
            raise UserError(f"weights: {path}, read as {source}: pos_embed has {rows + has_cls} positions, not {what}")
        found["pos_grid"] = math.isqrt(rows)
    provenance = {"source": source, "method": method}
    return Checkpoint(path, state, {**found, **flags}, registry_name(width, n_registers), provenance)
