"""timm's state dicts. Our names are timm's, and most public files have this layout once unwrapped.

``vit_*_patch16_224.*``, ``vit_*_patch14_dinov2.lvd142m``, ``*_reg4_*``, ``deit3_*``, ``*_gap_*``: with or
without [CLS] and registers, LayerScale, and positions for the prefix (``no_embed_class``: that of [CLS] is
inside ``cls_token``, or there is none). On timm's hub, ``config.json`` beside the file tells the architecture
and the mean and standard deviation of pixels.

A classifier is not part of the backbone. One that pools patches has ``fc_norm`` and leaves the backbone
without a final norm. Then features are those before ``fc_norm``, as in timm's ``forward_features``.

Gated MLPs are ``SwiGLUPacked`` (``vit_giant_patch14_dinov2``): one ``mlp.fc1``, the gate's rows first. DINOv3's networks
(``vit_*_patch16_dinov3``, ``..._qkvb``) are of timm's EVA: ``gamma_1/2``, ``mlp.fc1_g`` (the gate) and ``fc1_x``, and
``attn.q_bias``, ``v_bias`` or neither.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
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
    State,
    fused,
    grid_side,
    is_named,
    only_network,
    plain_vit,
    renamed,
    require,
    without,
)
from pretrain.weights.container import Container
from pretrain.weights.sources.dinov3 import LICENSE, PARTS, ROTARY, SAT_PIXELS, with_keys_biases

NEEDED = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
NORMS = ("norm.weight", "fc_norm.weight")
DINOV3 = ("cls_token", "patch_embed.proj.weight", "blocks.0.gamma_1", "blocks.0.gamma_2")
DINOV3_NAMES = (
    (r"(blocks\.\d+)\.gamma_([12])", r"\1.ls\2.gamma"),
    (r"(blocks\.\d+)\.attn\.q_bias", r"\1.attn.query.bias"),
    (r"(blocks\.\d+)\.attn\.v_bias", r"\1.attn.value.bias"),
)
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
# arguments of DINOv3's networks that change nothing of their features
OF_ANY_SIZE = {"img_size", "dynamic_img_size", "global_pool", "num_classes", "drop_path_rate", "drop_rate"}
# and those that tensors show, as our export writes them
SHOWN = {
    "patch_size",
    "embed_dim",
    "depth",
    "mlp_ratio",
    "init_values",
    "num_reg_tokens",
    "qkv_bias",
    "swiglu_align_to",
}
# networks whose departures no tensor shows
OTHER_NAMES = re.compile("quickgelu|clip|siglip|rope|relpos|rpn|resmlp")


def match(file: Container) -> Match:
    """By the hub's description; without it, by the names alone, which for DINOv3 nobody shares, else many sources."""
    if _is_dinov3(file.flat):
        return Match.MARKED
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
    if described and _is_dinov3(state) != ("_dinov3" in architecture):
        raise UserError(f"weights: {file.path} is no {architecture} by its tensors: take both from one model")
    if described and OTHER_NAMES.search(architecture):
        raise UserError(f"weights: {file.path} is timm's {architecture}, a network that is none of ours")
    state = without(state, "head.", "pre_logits.", *(["fc_norm."] if "norm.weight" not in state else []))
    arguments = _arguments(file) if described else {}
    _move_positions(state, arguments)
    tag = pretrained.get("tag") if described else None
    method = f"{architecture}.{tag}" if tag else architecture or file.path.stem
    pixels = (
        (pretrained["mean"], pretrained["std"])
        if described and {"mean", "std"} <= pretrained.keys()
        else None
    )
    if _is_dinov3(state):
        checkpoint = _dinov3(file, state, method, arguments)
        if tag in (None, "lvd1689m", "sat493m"):  # others trained some of timm's, as EUPE
            checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "license": LICENSE})
        pixels = SAT_PIXELS if pixels is None and is_named(file, "sat493m") else pixels
    else:
        unseen = {key: arguments[key] for key in ("num_heads",) if key in arguments}
        unseen["gelu"] = GELUS[str(arguments.get("act_layer", "gelu"))]
        checkpoint = plain_vit(file, state, method=method, pos_interpolation="bicubic_antialias", **unseen)
    return checkpoint if pixels is None else with_imagenet_pixels(checkpoint, *pixels)


def _is_dinov3(state: State) -> bool:
    """Whether a network has DINOv3's names in timm. Without registers, as ours may be, parts of qkv's bias mark it."""
    marked = "reg_token" in state or "blocks.0.attn.q_bias" in state
    return marked and all(key in state for key in DINOV3) and "pos_embed" not in state


def _dinov3(file: Container, state: State, method: str, arguments: Mapping[str, Any]) -> Checkpoint:
    """Its names as ours; keys have no bias where queries and values have one."""
    if unknown := arguments.keys() - OF_ANY_SIZE - SHOWN - {"num_heads"}:
        raise Misfit(
            f"model_args in config.json are of no network of ours: {', '.join(sorted(unknown))[:100]}"
        )
    require(state, ("norm.weight", "norm.bias"))
    state = renamed(state, _ours)
    state, biases = with_keys_biases(state)
    state = fused(fused(state, PARTS, "qkv"), ("fc1_g", "fc1_x"), "fc1")
    heads = {"num_heads": arguments["num_heads"]} if "num_heads" in arguments else {}
    return plain_vit(file, state, method=method, **ROTARY, **biases, **heads)


def _ours(key: str) -> str:
    for pattern, name in DINOV3_NAMES:
        key = re.sub(f"^{pattern}$", name, key)
    return key


def _described(file: Container) -> bool:
    told, pretrained = file.config.get("architecture"), file.config.get("pretrained_cfg")
    return isinstance(told, str) and isinstance(pretrained, Mapping)


def _arguments(file: Container) -> Mapping[str, Any]:
    """The arguments in the description that no tensor shows."""
    arguments = file.config.get("model_args") or {}
    if not isinstance(arguments, Mapping) or str(arguments.get("act_layer", "gelu")) not in GELUS:
        raise Misfit(f"model_args in config.json are of no network of ours: {str(arguments)[:100]}")
    sides = arguments.get("img_size", 0)
    if not _is_dinov3(file.flat) and isinstance(sides, list) and len(sides) == 2 and sides[0] != sides[1]:
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
