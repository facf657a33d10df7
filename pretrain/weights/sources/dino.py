"""DINO, and the methods that grew from its code and kept its files: iBOT, Mugs, CrIBo, CrOC
(:mod:`.patchwise` has two more).

A full checkpoint (``main_dino.py``) is ``{student: module.*, teacher, optimizer, epoch, args, ...}``. Each
network has ``backbone.*`` and its heads. A backbone alone is flat, at the top (DINO) or under ``state_dict``
(iBOT, Mugs), and does not tell its method. All methods evaluate the teacher and resample positions by scale
factors (n + 0.1) / G.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.container import Container, is_state
from pretrain.weights.layout import grid_side, plain_vit, strip, without
from pretrain.weights.sources.source import Match, Source

State = dict[str, Tensor]
NEEDED = ("cls_token", "pos_embed", "norm.weight", "norm.bias")
# What distinguishes the files: (the sources that have it, a key of the full checkpoint or the start of a
# tensor's name).
MARKS = (
    (("ibot",), "ibot_loss"),
    (("ibot",), "masked_embed"),
    (("ibot",), "blocks.0.gamma_1"),
    (("mugs",), "student_mem"),
    (("mugs",), "relation_blocks."),
    (("cribo",), "centroids_queue_cpu"),
    (("croc",), "croc_loss"),
    (("cribo", "croc"), "head.last_layer_c."),
    (("selfpatch",), "ca_head."),
    (("flsl",), "flsl_loss"),
    (("dinov2",), "blocks.0.ls1."),
    (("dinov2",), "register_tokens"),
    (("dinov2",), "dino_head."),
    (("dinov2", "mae", "droppos", "lomar"), "mask_token"),
    (("timm",), "reg_token"),
    (("posfield",), "pos_mask_token"),
    (("neco", "leopart"), "projection_head."),
    (("mae", "droppos"), "decoder_embed."),
    (("droppos",), "mask_pos_token"),
    (("lomar",), "blocks.0.attn.rpe_"),
)


@dataclass(frozen=True)
class Method:
    """A method whose full checkpoint is DINO's.

    Attributes:
        source, method: see :class:`pretrain.weights.sources.source.Source`.
        file_name: pattern of the public files' names.
        heads: starts of names beside ``backbone.*`` that are dropped.
        unused: starts of names inside the backbone that are dropped.
        needed: tensors that its backbone has, beyond those of any ViT.
        lacking: starts of names that its backbone does not have.
        renamed: a tensor's name in the backbone -> ours.
    """

    source: str
    method: str
    file_name: str
    heads: tuple[str, ...] = ("head.",)
    unused: tuple[str, ...] = ()
    needed: tuple[str, ...] = NEEDED
    lacking: tuple[str, ...] = ()
    renamed: Callable[[str], str] = str


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
    if not all(fits(method, backbone_of(state, method.unused)[0]) for state in networks.values()):
        return Match.NONE
    if is_named(file, method.file_name) or (method.source == "ibot" and is_ibots_backbone(file)):
        return Match.NAMED
    if "" in networks:  # it has timm's layout: any method may have left it
        return Match.POSSIBLE if method.needed != NEEDED else Match.NONE
    return Match.POSSIBLE if method.source == "dino" and not marks else Match.NONE


def convert(method: Method, file: Container, subnet: str | None) -> Checkpoint:
    """The teacher's backbone, or the student's if it is asked for. Positions are resampled as in DINO."""
    read_as = f"weights: {file.path}, read as {method.source}"
    for sources, mark in marks_of(file):
        if method.source not in sources:
            raise UserError(
                f"{read_as}: {mark} is found in files of {' and '.join(sources)}, not of {method.method}"
            )
    networks = {
        name: {
            method.renamed(key): value
            for key, value in inside_of(state, method.heads, method.unused, read_as).items()
        }
        for name, state in networks_of(file).items()
    }
    return take(
        file, networks, subnet, method.source, method.method, needed=method.needed, lacking=method.lacking
    )


def source_of(method: Method) -> Source:
    """The method as a source."""
    return Source(method.source, method.method, partial(match, method), partial(convert, method))


def networks_of(file: Container) -> dict[str, State]:
    """{teacher: ..., student: ...} of a full checkpoint, those that exist; {"": ...} of a flat state dict."""
    found = {name: dict(file.tree[name]) for name in ("teacher", "student") if is_state(file.tree.get(name))}
    return found or ({"": file.flat} if file.flat else {})


def marks_of(file: Container) -> list[tuple[tuple[str, ...], str]]:
    """The :data:`MARKS` that the file has."""
    names = {str(key) for key in file.tree} if not file.flat else set()
    for state in networks_of(file).values():
        names.update(re.sub(r"^(module\.)?(backbone\.)?", "", key) for key in state)
    return [(sources, mark) for sources, mark in MARKS if any(name.startswith(mark) for name in names)]


def is_named(file: Container, pattern: str) -> bool:
    """Whether a word of the file's name has this pattern."""
    return re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", file.path.stem.lower()) is not None


def is_ibots_backbone(file: Container) -> bool:
    """Whether the file has the name of iBOT's published backbones (of any size), and only their one key."""
    return set(file.tree) == {"state_dict"} and is_named(file, "checkpoint_(?:teacher|student)")


def fits(method: Method, state: Mapping[str, Tensor]) -> bool:
    """Whether a backbone has the tensors of this method, and learned positions on a square grid."""
    if not all(
        key in state for key in (*method.needed, "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    ):
        return False
    positions, has_cls = state["pos_embed"], "cls_token" in state
    if (
        positions.ndim != 3
        or starts_with_zero(positions)
        or any(key.startswith(method.lacking) for key in state)
    ):
        return False
    return grid_side(positions.shape[1] - has_cls) > 0


def starts_with_zero(positions: Tensor) -> bool:
    """Whether the first position is exactly zero, as [CLS] has it in the fixed sin-cos table of MAE and its
    descendants."""
    return positions.ndim == 3 and positions.shape[1] > 0 and not positions[:, 0].any()


def backbone_of(state: Mapping[str, Tensor], unused: tuple[str, ...] = ()) -> tuple[State, State]:
    """The tensors of the backbone, without ``unused``, and those beside it; prefixes of wrappers are
    stripped."""
    if all(key.startswith("module.") for key in state):
        state = strip(state, "module.")
    inside = strip(state, "backbone.")
    if not inside:
        return without(state, "head.", *unused), {}  # a backbone alone, perhaps with a classifier
    return without(inside, *unused), without(state, "backbone.")


def inside_of(state: State, heads: tuple[str, ...], unused: tuple[str, ...], read_as: str) -> State:
    """The backbone. Everything beside it has to be one of ``heads``.

    Raises:
        UserError: names what is not.
    """
    inside, beside = backbone_of(state, unused)
    if unknown := list(without(beside, *heads)):
        raise UserError(f"{read_as}: left over {', '.join(unknown[:8])}")
    return inside


def take(
    file: Container,
    networks: Mapping[str, State],
    subnet: str | None,
    source: str,
    method: str,
    *,
    default: str = "teacher",
    needed: tuple[str, ...] = NEEDED,
    lacking: tuple[str, ...] = (),
    interpolation: str = "dinov2",
) -> Checkpoint:
    """One network of a file as a checkpoint.

    Args:
        networks: {teacher: ..., student: ...} under our names, those that exist; {"": ...} if the file gives
            no name.
        subnet: the network to take; None: ``default``, or the only one.
        needed, lacking, interpolation: those of :func:`whole_vit`.

    Raises:
        UserError: the network is not there; :func:`whole_vit` refuses it; teacher and student differ in names
            or shapes (iBOT's mask token may be the student's alone).
    """
    read_as = f"weights: {file.path}, read as {source}"
    if not networks:
        held = ", ".join(map(str, list(file.flat or file.tree)[:5]))
        raise UserError(f"{read_as}: no network under the names of {method}'s files, but {held}")
    name = subnet or (default if default in networks else next(iter(networks)))
    if name not in networks:
        there = "one network that it gives no name" if "" in networks else f"only the {next(iter(networks))}"
        raise UserError(f"{read_as}: subnet {name} is not there; the file holds {there}")
    checkpoint = whole_vit(
        file, networks[name], source, method, needed=needed, lacking=lacking, interpolation=interpolation
    )
    shapes = [
        {(key, value.shape) for key, value in state.items() if key != "mask_token"}
        for state in networks.values()
    ]
    if differing := sorted({key for key, _ in shapes[0] ^ shapes[-1]}):
        raise UserError(
            f"{read_as}: teacher and student are not one network: they differ in {', '.join(differing[:8])}"
        )
    return with_origin(checkpoint, file, name)


def whole_vit(
    file: Container,
    state: State,
    source: str,
    method: str,
    *,
    needed: tuple[str, ...],
    lacking: tuple[str, ...] = (),
    interpolation: str = "dinov2",
) -> Checkpoint:
    """:func:`pretrain.weights.layout.plain_vit` of a complete backbone.

    A missing tensor would change the network that is built (a ViT without its ``norm`` is another ViT), so it
    is an error here.

    Args:
        needed: tensors that it has beside the blocks and the patch embedding.
        lacking: starts of names that it does not have.
        interpolation: ``pos_interpolation``.

    Raises:
        UserError: names a tensor that is missing, left over, or of a shape that fits no such ViT.
    """
    read_as = f"weights: {file.path}, read as {source}"
    if absent := [key for key in needed if key not in state]:
        raise UserError(f"{read_as}: no tensor {', '.join(absent)}")
    if foreign := [key for key in state if key.startswith(lacking)]:
        raise UserError(f"{read_as}: there is {', '.join(foreign[:8])}, which {method} has not")
    if interpolation == "dinov2" and starts_with_zero(state["pos_embed"]):
        raise UserError(
            f"{read_as}: the first position in pos_embed is zero, as in MAE's fixed table; {method}'s are learned"
        )
    return plain_vit(file.path, state, source, method, pos_interpolation=interpolation)


def with_origin(checkpoint: Checkpoint, file: Container, subnet: str) -> Checkpoint:
    """Add the name of the network and the file's epoch counter to the provenance, if there are any."""
    origin: dict[str, str | int] = {"subnet": subnet} if subnet else {}
    if type(epoch := file.tree.get("epoch")) is int:
        origin["epoch"] = epoch
    return replace(checkpoint, provenance={**checkpoint.provenance, **origin})


def _ibot_name(key: str) -> str:
    """LayerScale is ``gamma_1`` and ``gamma_2`` (``models/vision_transformer.py``); only the student has the
    mask token [1, D]."""
    if key == "masked_embed":
        return "mask_token"
    return re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", key)


MUGS_HEADS = ("instance_head.", "local_group_head.", "group_head.")
METHODS = (
    Method("dino", "DINO", "dino"),
    Method("ibot", "iBOT", "ibot", renamed=_ibot_name),
    Method(
        "mugs",
        "Mugs",
        r"mugs|vit_(?:small|base|large)_backbone_\d+ep",
        heads=MUGS_HEADS,
        unused=("relation_blocks.",),
    ),
    Method("cribo", "CrIBo", "cribo"),
    Method("croc", "CrOC", "croc"),
)
SOURCES = tuple(source_of(method) for method in METHODS)
