"""DINOv2, with and without registers: the published backbones, and the checkpoints of its training.

Published: flat, with ``mask_token`` [1, D], a grid of 37 x 37 positions, patches of 14 px and LayerScale
``ls1/2.gamma``. ``register_tokens`` [1, R, D] enter between [CLS] and the patches after positions are added,
as in our ViT. Training: ``{teacher: {backbone.*, dino_head.*, ibot_head.*}}``, or ``{model: {student.*,
teacher.*}}``, with blocks in chunks (``blocks.CHUNK.N.*``). Positions are resampled by scale factor, with
registers by size and antialiased (``dinov2/hub/backbones.py``).
"""

import re
from dataclasses import replace
from typing import Any

from pretrain.weights.common import (
    GATED,
    NEEDED,
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    inside_of,
    only_network,
    strip,
    take,
    unwrapped,
)
from pretrain.weights.container import Container, is_state

# all that is published
OWN = ("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.proj.", "blocks.", "norm.")
HEADS = ("dino_head.", "ibot_head.")  # dropped; one head may serve for both
CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # a block keeps its number in the network inside its chunk


def match(file: Container) -> Match:
    """By the heads of its training; a backbone alone, which others have tuned, by the file's name."""
    if any(head in key for state in _networks(file).values() for key in state for head in HEADS):
        return Match.MARKED
    state = file.flat
    needed = ("mask_token", "cls_token", "pos_embed", "patch_embed.proj.weight")
    if not all(key in state for key in needed) or not all(key.startswith(OWN) for key in state):
        return Match.NONE
    if state["mask_token"].ndim != 2:
        return Match.NONE
    return Match.NAMED if file.path.name.startswith("dinov2") else Match.POSSIBLE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The published backbone, or the teacher's (default) or student's of a training."""
    networks, name = _networks(file), subnet or "teacher"
    if not networks and file.flat:
        only_network(subnet)
        networks, name = {"": file.flat}, ""
    if name not in networks:
        raise Misfit(f"no backbone of a {name}, and no flat state dict")
    state = inside_of(networks[name], HEADS) if name else networks[name]
    if any(".mlp.w12." in key or ".mlp.w3." in key for key in state):
        raise Misfit(GATED)
    state = {
        CHUNK.sub(r"blocks.\1.", key).replace("register_tokens", "reg_token"): state[key] for key in state
    }
    has_registers = "reg_token" in state
    rule = "bicubic_antialias" if has_registers else "dinov2"
    found = take(file, {name: state}, None, needed=(*NEEDED, "blocks.0.ls1.gamma"), interpolation=rule)
    method = {"method": "DINOv2-reg"} if has_registers else {}
    return replace(found, provenance={**method, **found.provenance})


def _networks(file: Container) -> dict[str, State]:
    """The networks of a training that have a backbone, under their own keys or by their prefixes."""
    trees: dict[str, Any] = {name: file.tree.get(name) for name in ("teacher", "student")}
    found = {
        name: dict(tree) if is_state(tree) else strip(file.flat, f"{name}.") for name, tree in trees.items()
    }
    return {name: state for name, state in found.items() if strip(unwrapped(state), "backbone.")}


SOURCES = (Source("dinov2", "DINOv2", match, convert),)
