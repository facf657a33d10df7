"""DINOv2, with and without registers: the published backbones, and the checkpoints of its training.

Published: flat, with ``mask_token`` [1, D], a grid of 37 x 37 positions, patches of 14 px and LayerScale
``ls1/2.gamma``. ``register_tokens`` [1, R, D] enter between [CLS] and the patches after positions are added,
as in our ViT. Training: ``{teacher: {backbone.*, dino_head.*, ibot_head.*}}``, or ``{model: {student.*,
teacher.*}}``, with blocks in chunks (``blocks.CHUNK.N.*``). Positions are resampled by scale factor, with
registers by size and antialiased (``dinov2/hub/backbones.py``).
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.common import NEEDED as DINOS
from pretrain.weights.common import (
    Checkpoint,
    Match,
    Source,
    misfit,
    only_network,
    strip,
    whole_vit,
    with_origin,
)
from pretrain.weights.container import Container, is_state

# all that is published
OWN = ("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.proj.", "blocks.", "norm.")
NEEDED = (*DINOS, "blocks.0.ls1.gamma")
NETWORKS = ("teacher", "student")
HEADS = ("dino_head.", "ibot_head.")  # dropped; one head may serve for both
CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # a block keeps its number in the network inside its chunk


def match(file: Container) -> Match:
    """By the heads of its training; a backbone alone, which others have tuned, by the file's name."""
    if any(
        _training(file, name) and any(head in key for key in _network(file, name) for head in HEADS)
        for name in NETWORKS
    ):
        return Match.MARKED
    state = file.flat
    needed = ("mask_token", "cls_token", "pos_embed", "patch_embed.proj.weight")
    if not all(key in state for key in needed) or not all(key.startswith(OWN) for key in state):
        return Match.NONE
    if state["mask_token"].ndim != 2 or "pos_mask_token" in state:
        return Match.NONE
    return Match.NAMED if file.path.name.startswith("dinov2") else Match.POSSIBLE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The published backbone, or the teacher's (default) or student's of a training."""
    name = subnet or "teacher"
    state = _training(file, name)
    if not state and file.flat and not any(_network(file, network) for network in NETWORKS):
        only_network(file.path, "dinov2", subnet)
        name, state = "", file.flat
    if not state:
        raise misfit(file.path, "dinov2", f"no backbone of a {name}, and no flat state dict")
    if any(".mlp.w12." in key or ".mlp.w3." in key for key in state):
        raise UserError(
            f"weights: {file.path} has gated MLPs (SwiGLU), as DINOv2's giant (ViT-g): a network that is none of ours"
        )
    state = {CHUNK.sub(r"blocks.\1.", key): value for key, value in state.items()}
    has_registers = "register_tokens" in state
    if has_registers:
        state["reg_token"] = state.pop("register_tokens")
    rule, method = ("bicubic_antialias", "DINOv2-reg") if has_registers else ("dinov2", "DINOv2")
    return with_origin(whole_vit(file, state, "dinov2", method, NEEDED, interpolation=rule), file, name)


def _network(file: Container, network: str) -> dict[str, Tensor]:
    """One network of a training, under its own key or by its prefix."""
    tree: Any = file.tree.get(network)
    return dict(tree) if is_state(tree) else strip(file.flat, network + ".")


def _training(file: Container, network: str) -> Mapping[str, Tensor]:
    """The backbone of one network of a training; empty if there is none."""
    state = _network(file, network)
    if state and all(key.startswith("module.") for key in state):
        state = strip(state, "module.")
    unknown = {key: value for key, value in state.items() if not key.startswith(("backbone.", *HEADS))}
    backbone = strip(state, "backbone.")
    return {**backbone, **unknown} if backbone else {}


SOURCES = (Source("dinov2", "DINOv2", match, convert),)
