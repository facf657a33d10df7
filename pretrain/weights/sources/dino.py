"""DINO, and the methods that grew from its code and kept its files: iBOT, Mugs, CrIBo, CrOC, SelfPatch, FLSL.

A full checkpoint (``main_dino.py``) is ``{student: module.*, teacher, optimizer, epoch, args, ...}``. Each
network has ``backbone.*`` and its heads. A backbone alone is flat, at the top (DINO) or under ``state_dict``
(iBOT, Mugs), and does not tell its method. All methods evaluate the teacher and resample positions by scale
factors (n + 0.1) / G.

The networks of the last two attend over patches alone. SelfPatch (``selfpatch_vision_transformer.py``) has no
[CLS] and no norm after the last block; its heads have their own. FLSL (``make_vit_noclass``): the [CLS] token
stays in the file but never enters the sequence. By default positions are MAE's table without a row for [CLS].
There is a norm after the last block, unless the run switched ``post_layernorm`` off; then the file has none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from pretrain.weights.common import (
    NEEDED,
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    backbone_of,
    grid_side,
    inside_of,
    is_fixed,
    is_named,
    renamed,
    starts_with_zero,
    take,
)
from pretrain.weights.container import Container, is_state

# What distinguishes the files: (the sources that have it, a key of the full checkpoint or the start of a
# tensor's name).
MARKS = tuple(
    (tuple(sources.split()), mark)
    for sources, marks in (
        ("ibot", "ibot_loss masked_embed blocks.0.gamma_1"),
        ("mugs", "student_mem relation_blocks."),
        ("cribo", "centroids_queue_cpu"),
        ("croc", "croc_loss"),
        ("cribo croc", "head.last_layer_c."),
        ("selfpatch", "ca_head."),
        ("flsl", "flsl_loss"),
        ("dinov2 dinov3", "blocks.0.ls1. dino_head."),
        ("dinov2", "register_tokens"),
        ("dinov3", "storage_tokens rope_embed."),
        ("dinov2 dinov3 mae droppos lomar", "mask_token"),
        ("timm", "reg_token"),
        ("posfield", "pos_mask_token"),
        ("neco leopart", "projection_head."),
        ("mae droppos", "decoder_embed."),
        ("droppos", "mask_pos_token"),
        ("lomar", "blocks.0.attn.rpe_"),
    )
    for mark in marks.split()
)


@dataclass(frozen=True)
class Method:
    """A method whose full checkpoint is DINO's.

    Attributes:
        source, method: see :class:`pretrain.weights.common.Source`.
        file_name: pattern of the public files' names.
        heads: starts of names beside ``backbone.*`` that are dropped.
        unused: starts of names inside the backbone that are dropped.
        needed: tensors that its backbone has, beyond those of any ViT.
        lacking: starts of names that its backbone does not have.
        renamed: {pattern of a tensor's name in the backbone: ours}.
    """

    source: str
    method: str
    file_name: str
    heads: tuple[str, ...] = ("head.",)
    unused: tuple[str, ...] = ()
    needed: tuple[str, ...] = NEEDED
    lacking: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


def match(method: Method, file: Container) -> Match:
    """By marks that only this method's files have, else by the file's name. DINO's full checkpoints have no
    such mark."""
    networks, marks = networks_of(file), marks_of(file)
    if any((method.source,) == sources for sources, _ in marks):
        return Match.MARKED
    if any(method.source not in sources for sources, _ in marks) or not networks:
        return Match.NONE
    if method.source == "dino" and "dino_loss" in file.tree and not marks:
        return Match.MARKED
    if not all(_fits(method, backbone_of(state, method.unused)[0]) for state in networks.values()):
        return Match.NONE
    # iBOT's published backbones (of any size) have one key and this name
    is_ibots = method.source == "ibot" and set(file.tree) == {"state_dict"}
    if is_named(file, method.file_name) or (is_ibots and is_named(file, "checkpoint_(?:teacher|student)")):
        return Match.NAMED
    if "" in networks:  # it has timm's layout: any method may have left it
        return Match.POSSIBLE if method.needed != NEEDED else Match.NONE
    return Match.POSSIBLE if method.source == "dino" and not marks else Match.NONE


def match_flsl(method: Method, file: Container) -> Match:
    """By its loss; a backbone alone, by a [CLS] token without a fixed position, else by the file's name."""
    evidence, networks = match(method, file), networks_of(file)
    if "" not in networks or evidence == Match.NONE:
        return evidence
    backbone, _ = backbone_of(networks[""])
    if "cls_token" in backbone and is_fixed(backbone, has_cls=False):
        return Match.MARKED
    return evidence if evidence > Match.POSSIBLE else Match.NONE


def convert(method: Method, file: Container, subnet: str | None) -> Checkpoint:
    """The teacher's backbone, or the student's if it is asked for. Positions are resampled as in DINO."""
    for sources, mark in marks_of(file):
        if method.source not in sources:
            raise Misfit(f"{mark} is found in files of {' and '.join(sources)}, not of {method.method}")
    networks = {
        name: inside_of(state, method.heads, method.unused) for name, state in networks_of(file).items()
    }
    for pattern, ours in method.renamed.items():
        networks = {n: renamed(s, partial(re.sub, pattern, ours)) for n, s in networks.items()}
    return take(file, networks, subnet, needed=method.needed, lacking=method.lacking)


def networks_of(file: Container) -> dict[str, State]:
    """{teacher: ..., student: ...} of a full checkpoint, those that exist; {"": ...} of a flat state dict."""
    found = {name: dict(file.tree[name]) for name in ("teacher", "student") if is_state(file.tree.get(name))}
    return found or file.alone


def marks_of(file: Container) -> list[tuple[tuple[str, ...], str]]:
    """The :data:`MARKS` that the file has."""
    names = {str(key) for key in file.tree} if not file.flat else set()
    for state in networks_of(file).values():
        names.update(re.sub(r"^(module\.)?(backbone\.)?", "", key) for key in state)
    return [(sources, mark) for sources, mark in MARKS if any(name.startswith(mark) for name in names)]


def _fits(method: Method, state: Mapping[str, Tensor]) -> bool:
    """Whether a backbone has the tensors of this method, and learned positions on a square grid."""
    needed = (*method.needed, "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    if not all(key in state for key in needed) or any(key.startswith(method.lacking) for key in state):
        return False
    positions = state["pos_embed"]
    is_learned = positions.ndim == 3 and not starts_with_zero(positions)
    return is_learned and grid_side(positions.shape[1] - ("cls_token" in state)) > 0


# LayerScale as in ``models/vision_transformer.py``; only the student has the mask token [1, D]
IBOTS = {r"^masked_embed$": "mask_token", r"^(blocks\.\d+)\.gamma_([12])$": r"\1.ls\2.gamma"}
MUGS_HEADS = ("instance_head.", "local_group_head.", "group_head.")
MUGS_NAMES = r"mugs|vit_(?:small|base|large)_backbone_\d+ep"
PATCH_HEADS, NO_CLS = ("ca_head.", "c_head.", "p_head."), ("cls_token", "norm.", "fc_norm.")
METHODS = (
    Method("selfpatch", "SelfPatch", "selfpatch", heads=PATCH_HEADS, needed=("pos_embed",), lacking=NO_CLS),
    # ``norm.*`` beside the backbone is that of ``layernorm_on_mode``: it sees means of clusters, never the
    # backbone's tokens.
    Method("flsl", "FLSL", "flsl", heads=("head.", "norm."), unused=("cls_token",), needed=("pos_embed",)),
    Method("dino", "DINO", "dino"),
    Method("ibot", "iBOT", "ibot", renamed=IBOTS),
    Method("mugs", "Mugs", MUGS_NAMES, heads=MUGS_HEADS, unused=("relation_blocks.",)),
    Method("cribo", "CrIBo", "cribo"),
    Method("croc", "CrOC", "croc"),
)
_ALL = [
    Source(m.source, m.method, partial(match_flsl if m.source == "flsl" else match, m), partial(convert, m))
    for m in METHODS
]
PATCHWISE, SOURCES = _ALL[:2], _ALL[2:]
