"""What the sources share: prefixes of keys, and the arguments of a plain ViT as the shapes of its tensors
tell them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint

HEAD_DIM = 64  # of every public ViT of these sizes
WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


def strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose key begins with ``prefix``, under the rest of the key."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def without(state: Mapping[str, Tensor], *starts: str) -> dict[str, Tensor]:
    """All tensors but those whose key begins with one of ``starts``."""
    return {key: value for key, value in state.items() if not key.startswith(starts)}


def grid_side(n_positions: int) -> int:
    """Side of the square grid that has so many positions; 0 if none has."""
    side = math.isqrt(max(n_positions, 0))
    return side if side**2 == n_positions else 0


def registry_name(width: int, n_registers: int = 0) -> str | None:
    """``vit_small_patch16``, ``..._reg4``: the registered name of this width, if there is one."""
    if width not in WIDTHS:
        return None
    return f"vit_{WIDTHS[width]}_patch16" + ("_reg4" if n_registers == 4 else "")


def plain_vit(
    path: Path, state: Mapping[str, Tensor], source: str, method: str, **model_kwargs: Any
) -> Checkpoint:
    """A checkpoint from a state dict under our names; the shapes tell most arguments of the ViT.

    Args:
        state: ``patch_embed.proj.*``, ``blocks.*``; and if there are any ``norm.*``, ``ls1/2.gamma``,
            ``cls_token`` [1, 1, D], ``reg_token`` [1, R, D], ``pos_embed`` [1, (1 +) G * G, D] with a row for
            [CLS] exactly when there is a ``cls_token``.
        source, method: for the provenance.
        model_kwargs: what shapes do not tell (``gelu``, ``ln_eps``, ``pos_interpolation``, ...), or what
            overrides them.

    Raises:
        UserError: names a tensor that every ViT needs and that is absent, or of a shape that fits no ViT.
    """
    read_as = f"weights: {path}, read as {source}"
    kernel = _shaped(state, "patch_embed.proj.weight", 4, read_as)
    if kernel.shape[2] != kernel.shape[3] or not kernel.shape[0]:
        raise UserError(f"{read_as}: patch_embed.proj.weight is {tuple(kernel.shape)}, no square patch")
    width, has_cls = kernel.shape[0], "cls_token" in state
    numbers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    depth = 1 + max((int(n) for n in numbers if n.isdecimal() and len(n) < 6), default=-1)
    if absent := [i for i in range(max(depth, 1)) if str(i) not in numbers]:
        raise UserError(f"{read_as}: no tensor of blocks.{absent[0]}, but there are {depth} blocks")
    _shaped(state, "blocks.0.attn.qkv.weight", 2, read_as)
    hidden = _shaped(state, "blocks.0.mlp.fc1.weight", 2, read_as).shape[0]
    if _shaped(state, "blocks.0.mlp.fc2.weight", 2, read_as).shape[1] * 2 == hidden:
        raise UserError(f"{read_as}: its MLPs are gated (SwiGLU): a network that is none of ours")
    n_registers = _shaped(state, "reg_token", 3, read_as).shape[1] if "reg_token" in state else 0
    found: dict[str, Any] = dict(
        embed_dim=width,
        depth=depth,
        num_heads=width // HEAD_DIM,
        mlp_ratio=hidden / width,
        patch_size=kernel.shape[2],
        n_registers=n_registers,
        has_cls=has_cls,
        final_norm="norm.weight" in state,
        layerscale=1e-5 if "blocks.0.ls1.gamma" in state else None,
        pos_encoding="standard" if "pos_embed" in state else "none",
        mask_tokens="mask_token" in state and "pos_mask_token" in state,
    )
    if "pos_embed" in state:
        rows = _shaped(state, "pos_embed", 3, read_as).shape[1] - has_cls
        found["pos_grid"] = grid_side(rows)
        if not found["pos_grid"]:
            what = "1 + a square grid" if has_cls else "a square grid"
            raise UserError(f"{read_as}: pos_embed has {rows + has_cls} positions, not {what}")
    provenance = {"source": source, "method": method}
    return Checkpoint(
        path,
        state,
        {**found, **model_kwargs},
        registry_name(width, n_registers),
        provenance,
        "depth" not in model_kwargs,
    )


def only_network(path: Path, source: str, subnet: str | None) -> None:
    """Raises UserError if a network is asked for by name: the file holds one network without a name."""
    if subnet is not None:
        raise UserError(
            f"weights: {path}, read as {source}: subnet {subnet} is not there; the file holds one network without a name"
        )


def _shaped(state: Mapping[str, Tensor], key: str, n_dims: int, read_as: str) -> Tensor:
    """A tensor that every ViT has, with this number of dimensions."""
    if key not in state:
        raise UserError(f"{read_as}: no tensor {key}")
    if state[key].ndim != n_dims:
        raise UserError(f"{read_as}: {key} is {tuple(state[key].shape)}, not of {n_dims} dimensions")
    return state[key]
