"""DINOv2, with and without registers, and Franca: the published backbones, and the checkpoints of a training.

DINOv2's published files are flat, with ``mask_token`` [1, D], a grid of 37 x 37 positions, patches of 14 px and
LayerScale ``ls1/2.gamma``. ``register_tokens`` [1, R, D] enter between [CLS] and the patches after positions are
added, as in our ViT. MLPs of ViT-g are gated: ``mlp.w12``, the gate's rows first, and ``mlp.w3``. Training:
``{teacher: {backbone.*, dino_head.*, ibot_head.*}}``, or ``{model: {student.*, teacher.*}}``, with blocks in chunks
(``blocks.CHUNK.N.*``). Positions are resampled by scale factor, with registers by size and antialiased
(``dinov2/hub/backbones.py``).

Franca (Venkataramanan et al., 2025; ``franca/models/vision_transformer.py``) is DINOv2's network with gated MLPs in
every size: ``{teacher: ...}``, with the prefixes of its training or none. Its heads (Matryoshka) and ``rasa_head.*``,
which takes positions out of the final tokens, are no part of the backbone. Its authors' runs of DINOv2
(``franca_vitb14_Dinov2_In21K.pth``) have the same layout.
"""

import re
from dataclasses import replace
from typing import Any

from pretrain.weights.common import (
    NEEDED,
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    inside_of,
    is_named,
    only_network,
    renamed,
    replacing,
    strip,
    take,
    unwrapped,
    without,
)
from pretrain.weights.container import Container, is_state

# all that is published
OWN = ("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.proj.", "blocks.", "norm.")
HEADS = ("dino_head.", "ibot_head.")  # dropped; one head may serve for both
RASA = "rasa_head."
CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # a block keeps its number in the network inside its chunk
RENAMED = {"register_tokens": "reg_token", ".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}


def match(file: Container) -> Match:
    """By the heads of its training; a backbone alone, which others have tuned, by the file's name."""
    if any(head in key for state in trained(file).values() for key in state for head in HEADS):
        return Match.MARKED
    state = file.flat
    needed = ("mask_token", "cls_token", "pos_embed", "patch_embed.proj.weight")
    if not all(key in state for key in needed) or not all(key.startswith(OWN) for key in state):
        return Match.NONE
    if state["mask_token"].ndim != 2:
        return Match.NONE
    return Match.NAMED if file.path.name.startswith("dinov2") else Match.POSSIBLE


def match_franca(file: Container) -> Match:
    """By its heads, else by gated MLPs and the file's name; without it, by a backbone alone that is called a teacher."""
    networks = _francas(file) or file.alone
    keys = [key for state in networks.values() for key in state]
    if any(RASA in key or ".matryoshka_projections." in key for key in keys):
        return Match.MARKED
    if not any(".mlp.w12." in key for key in keys):
        return Match.NONE
    if is_named(file, "franca"):
        return Match.MARKED
    is_bare = "" not in networks and not any(key.startswith(("backbone.", "module.")) for key in keys)
    return Match.POSSIBLE if is_bare else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The published backbone, or the teacher's (default) or student's of a training."""
    found = _convert(file, *chosen(file, subnet, trained(file)))
    method = {"method": "DINOv2-reg"} if found.model_kwargs["n_registers"] else {}
    return replace(found, provenance={**method, **found.provenance})


def convert_franca(file: Container, subnet: str | None) -> Checkpoint:
    """The backbone, without RASA."""
    found = _convert(file, *chosen(file, subnet, _francas(file), unused=(RASA,)))
    method = {"method": "DINOv2 (Franca's run)"} if "dinov2" in file.path.stem.lower() else {}
    return replace(found, provenance={**method, **found.provenance})


def _convert(file: Container, name: str, state: State) -> Checkpoint:
    state = renamed(state, replacing(RENAMED))
    rule = "bicubic_antialias" if "reg_token" in state else "dinov2"
    return take(file, {name: state}, None, needed=(*NEEDED, "blocks.0.ls1.gamma"), interpolation=rule)


def chosen(
    file: Container, subnet: str | None, networks: dict[str, State], unused: tuple[str, ...] = ()
) -> tuple[str, State]:
    """The name of a backbone and its tensors, blocks out of their chunks: the teacher's (default) or the student's of a
    training, or the one of a flat file, which has no name.

    Args:
        networks: those of a training (:func:`trained`); empty for a flat file.
        unused: starts of names inside the backbone that are dropped.

    Raises:
        Misfit: it is not there; names a tensor beside it that is no head's.
    """
    name = subnet or "teacher"
    if not networks and file.flat:
        only_network(subnet)
        return "", without(file.flat, *unused)
    if name not in networks:
        raise Misfit(f"no backbone of a {name}, and no flat state dict")
    state = inside_of(networks[name], HEADS, unused)
    return name, renamed(state, lambda key: CHUNK.sub(r"blocks.\1.", key))


def trained(file: Container) -> dict[str, State]:
    """The networks of a training that have a backbone, under their own keys or by their prefixes."""
    trees: dict[str, Any] = {name: file.tree.get(name) for name in ("teacher", "student")}
    found = {
        name: dict(tree) if is_state(tree) else strip(file.flat, f"{name}.") for name, tree in trees.items()
    }
    return {name: state for name, state in found.items() if strip(unwrapped(state), "backbone.")}


def _francas(file: Container) -> dict[str, State]:
    """The networks of a training of Franca's, whose published files hold a teacher without a prefix."""
    trees: dict[str, Any] = {name: file.tree.get(name) for name in ("teacher", "student")}
    return trained(file) or {name: dict(tree) for name, tree in trees.items() if is_state(tree)}


SOURCES = (
    Source("franca", "Franca", match_franca, convert_franca),
    Source("dinov2", "DINOv2", match, convert),
)
