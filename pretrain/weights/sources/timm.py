"""timm's state dicts. Our names are timm's, and most public files have this layout once unwrapped.

``vit_*_patch16_224.*``, ``vit_*_patch14_dinov2.lvd142m``, ``*_reg4_*``, ``deit3_*``, ``*_gap_*``: with or
without [CLS] and registers, LayerScale, and positions for the prefix (``no_embed_class``: that of [CLS] is
inside ``cls_token``, or there is none). On timm's hub, ``config.json`` beside the file tells the architecture
and the mean and standard deviation of pixels.

A classifier is not part of the backbone. One that pools patches has ``fc_norm`` and leaves the backbone
without a final norm. Then features are those before ``fc_norm``, as in timm's ``forward_features``.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.adapt import with_imagenet_pixels
from pretrain.weights.common import (
    Checkpoint,
    Match,
    Misfit,
    Source,
    grid_side,
    only_network,
    plain_vit,
    without,
)
from pretrain.weights.container import Container

NEEDED = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
NORMS = ("norm.weight", "fc_norm.weight")
GELUS = {"gelu": "erf", "gelu_tanh": "tanh"}
DEPARTURES = {
    r"norm_pre\.": "a norm before the first block",
    r"blocks\.\d+\.attn\.[qk]_norm\.": "normalized queries and keys",
    r"blocks\.\d+\.(attn|mlp)\.norm\.": "norms inside its blocks",
    r"attn_pool\.": "attention pooling (SigLIP)",
    r"patch_embed\.(backbone|norm)\.": "more than a projection before its blocks",
    r"blocks\.\d+\.(attns|ffns)\.": "parallel branches in its blocks",
    r"blocks\.\d+\.attn\.rel_pos|rope": "relative positions",
}
# networks whose departures no tensor shows
OTHER_NAMES = re.compile("quickgelu|clip|siglip|rope|relpos|rpn|resmlp")


def match(file: Container) -> Match:
    """By the hub's description; without it, by the names alone, which many sources share."""
    if not all(key in file.flat for key in NEEDED):
        return Match.NONE
    if _described(file):
        return Match.MARKED
    return Match.POSSIBLE if any(key in file.flat for key in NORMS) else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The backbone. Positions are resampled as in timm: bicubic by size, antialiased."""
    only_network(subnet)
    state, described = dict(file.flat), _described(file)
    architecture, pretrained = str(file.config.get("architecture", "")), file.config.get("pretrained_cfg", {})
    for pattern, what in DEPARTURES.items():
        if any(re.match(pattern, key) for key in state):
            raise Misfit(f"it has {what}: a network that is none of ours")
    if described and OTHER_NAMES.search(architecture):
        raise UserError(f"weights: {file.path} is timm's {architecture}, a network that is none of ours")
    state = without(state, "head.", "pre_logits.", *(["fc_norm."] if "norm.weight" not in state else []))
    arguments = _arguments(file) if described else {}
    _move_positions(state, arguments)
    tag = pretrained.get("tag") if described else None
    method = f"{architecture}.{tag}" if tag else architecture or file.path.stem
    unseen = {key: arguments[key] for key in ("num_heads",) if key in arguments}
    unseen |= {
        "gelu": GELUS[str(arguments.get("act_layer", "gelu"))],
        "pos_interpolation": "bicubic_antialias",
    }
    checkpoint = plain_vit(file, state, method=method, **unseen)
    if described and "mean" in pretrained and "std" in pretrained:
        return with_imagenet_pixels(checkpoint, pretrained["mean"], pretrained["std"])
    return checkpoint


def _described(file: Container) -> bool:
    told, pretrained = file.config.get("architecture"), file.config.get("pretrained_cfg")
    return isinstance(told, str) and isinstance(pretrained, Mapping)


def _arguments(file: Container) -> Mapping[str, Any]:
    """The arguments in the description that no tensor shows."""
    arguments = file.config.get("model_args") or {}
    if not isinstance(arguments, Mapping) or str(arguments.get("act_layer", "gelu")) not in GELUS:
        raise Misfit(f"model_args in config.json are of no network of ours: {str(arguments)[:100]}")
    sides = arguments.get("img_size", 0)
    if isinstance(sides, list) and len(sides) == 2 and sides[0] != sides[1]:
        raise Misfit(f"positions for images of {sides[0]} x {sides[1]} px, not of a square grid")
    return arguments


def _move_positions(state: dict[str, Tensor], arguments: Mapping[str, Any]) -> None:
    """Keep the positions of the patches and of [CLS], if there is one; add those of registers to the
    registers."""
    positions: Any = state.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return
    n_cls = int("cls_token" in state)
    n_registers = state["reg_token"].shape[1] if "reg_token" in state and state["reg_token"].ndim == 3 else 0
    allowed = (0,) if arguments.get("no_embed_class") else (0, n_cls, n_cls + n_registers)
    n_prefix = next((n for n in allowed if grid_side(positions.shape[1] - n)), None)
    if n_prefix is None:
        raise Misfit(f"pos_embed has {positions.shape[1]} positions, for no square grid")
    cls, patches = positions[:, :n_cls], positions[:, n_prefix:]
    if not n_prefix:
        cls = torch.zeros_like(cls)
    elif n_prefix > n_cls:
        state["reg_token"] = state["reg_token"] + positions[:, n_cls:n_prefix]
    state["pos_embed"] = torch.cat([cls, patches], dim=1)


SOURCES = (Source("timm", "timm", match, convert),)
