"""What the sources of weights share: their interface, and the names and shapes of a plain ViT."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.position import sincos_table
from pretrain.backbones.vit import SIZES
from pretrain.weights.container import Container

State = dict[str, Tensor]
NEEDED = ("cls_token", "pos_embed", "norm.weight", "norm.bias")


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors under our names, and what it says about the network they belong to.

    Attributes:
        state: {our name: tensor}, on the CPU.
        model_kwargs: the arguments of :class:`pretrain.backbones.vit.ViT` that the file determines.
        backbone: registry name, if the file or its shapes tell it.
        provenance: JSON values that later stages report: ``source``, ``method`` (of :class:`Source`),
            ``effective_epochs`` if the file says it, ...
        depth_is_counted: only the highest block number tells the depth, so a file that lost its last blocks
            looks whole.
    """

    path: Path
    state: Mapping[str, Tensor]
    model_kwargs: Mapping[str, Any]
    backbone: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    depth_is_counted: bool = False


class Match(IntEnum):
    """How well a file fits a source."""

    NONE = 0  # it has another layout
    POSSIBLE = 1  # the layout fits; other sources have it too
    NAMED = 2  # the same, and the file's name says the source
    MARKED = 3  # the content has marks of this source alone


class Misfit(ValueError):
    """Why a source cannot take a file. ``read_checkpoint`` puts the file and the source before it."""


@dataclass(frozen=True)
class Source:
    """One method's public files.

    Attributes:
        name: what ``source=`` takes, such as ``dino``.
        method: the name in tables, such as ``DINO``, where ``convert`` gives no other.
        match: how well an opened file fits, by its keys, shapes, values and name. It never raises.
        convert: (file, subnet) -> the file as a checkpoint under our names. ``subnet`` chooses one of several
            networks: ``teacher``, ``student``, or None for the one that the method's authors evaluate. It
            drops what the source lists and nothing else; what it does not know stays in the state and becomes
            an error by name. It raises :class:`Misfit` if ours has no such network.
    """

    name: str
    method: str
    match: Callable[[Container], Match]
    convert: Callable[[Container, str | None], Checkpoint]


def strip(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose key begins with ``prefix``, under the rest of the key."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def without(state: Mapping[str, Tensor], *starts: str) -> State:
    """All tensors but those whose key begins with one of ``starts``."""
    return {key: value for key, value in state.items() if not key.startswith(starts)}


def unwrapped(state: State) -> State:
    """Without the prefix of torch's DDP, if every name has it."""
    return strip(state, "module.") if all(key.startswith("module.") for key in state) else state


def is_named(file: Container, pattern: str) -> bool:
    """Whether a word of the file's name has this pattern."""
    return re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", file.path.stem.lower()) is not None


def grid_side(n_positions: int) -> int:
    """Side of the square grid that has so many positions; 0 if none has."""
    side = math.isqrt(max(n_positions, 0))
    return side if side**2 == n_positions else 0


def starts_with_zero(positions: Tensor) -> bool:
    """Whether the first position is exactly zero, as [CLS] has it in MAE's fixed sin-cos table."""
    return positions.ndim == 3 and positions.shape[1] > 0 and not positions[:, 0].any()


def is_fixed(state: Mapping[str, Tensor], has_cls: bool = True) -> bool:
    """Whether ``pos_embed`` is :func:`sincos_table` up to half precision, after a zero for [CLS] where there
    is a row for it."""
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or len(positions) != 1:
        return False
    if positions.shape[2] % 4 or positions.shape[1] <= has_cls:
        return False
    table = sincos_table(math.isqrt(positions.shape[1] - has_cls), positions.shape[2])
    if has_cls:
        table = torch.cat([torch.zeros_like(table[:1]), table])
    return table.shape == positions.shape[1:] and torch.allclose(positions[0].double(), table, atol=1e-3)


def heads_of(width: int) -> int:
    """How many heads public ViTs of this width have: each 64 wide, in the 7B 128."""
    return next((of["num_heads"] for of in SIZES.values() if of["embed_dim"] == width), width // 64)


def fused(state: State, parts: Sequence[str], whole: str) -> State:
    """With the layers ``PART.weight`` and ``bias`` of one place as one layer ``WHOLE``, its rows in the parts' order.

    Raises:
        Misfit: names a part that is missing, parts of several shapes, or the whole where it is there, too.
    """
    names = re.compile(rf"(.*\.)?(?:{'|'.join(parts)})\.(weight|bias)")
    kept, places = dict(state), dict.fromkeys(m.groups() for key in state if (m := names.fullmatch(key)))
    for place, kind in places:
        keys = [f"{place or ''}{part}.{kind}" for part in parts]
        if absent := [key for key in keys if key not in kept]:
            raise Misfit(f"no tensor {absent[0]}")
        found = [kept.pop(key) for key in keys]
        if len({part.shape for part in found}) > 1 or not found[0].ndim:
            raise Misfit(f"{', '.join(keys)} are of several shapes")
        if (key := f"{place or ''}{whole}.{kind}") in kept:
            raise Misfit(f"left over {key} beside {', '.join(keys)}")
        kept[key] = torch.cat(found)
    return kept


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> State:
    """Under other names.

    Raises:
        Misfit: two tensors would have one name.
    """
    named = dict[str, str]()
    for key in state:
        if (ours := rename(key)) in named:
            raise Misfit(f"left over {key} beside {named[ours]}")
        named[ours] = key
    return {ours: state[key] for ours, key in named.items()}


def replacing(names: Mapping[str, str]) -> Callable[[str], str]:
    """Renames keys by parts of them."""

    def rename(key: str) -> str:
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        return key

    return rename


def require(state: Mapping[str, Tensor], needed: Sequence[str]) -> None:
    """Raises Misfit that names those of ``needed`` that are missing."""
    if absent := [key for key in needed if key not in state]:
        raise Misfit(f"no tensor {', '.join(absent)}")


def registry_name(width: int, n_registers: int = 0, swiglu: bool = False) -> str | None:
    """``vit_small_patch16``, ``..._reg4``: the registered name of this width and kind of MLP, if there is one; of a
    gated one (Franca's ViT-B) else that of its width."""
    found = {of.get("swiglu", False): key for key, of in SIZES.items() if of["embed_dim"] == width}
    size = found.get(swiglu, found.get(False))
    return size and f"vit_{size}_patch16" + ("_reg4" if n_registers == 4 else "")


def only_network(subnet: str | None) -> None:
    """Raises Misfit if a network is asked for by name: the file holds one network without a name."""
    if subnet is not None:
        raise Misfit(f"subnet {subnet} is not there; the file holds one network without a name")


def named(keys: list[str]) -> str:
    """The first of them, for an error."""
    return ", ".join(keys[:8])


def inside_of(state: State, heads: tuple[str, ...], unused: tuple[str, ...] = ()) -> State:
    """The backbone of a network (:func:`backbone_of`). Everything beside it has to be one of ``heads``.

    Raises:
        Misfit: names what is not.
    """
    inside, beside = backbone_of(state, unused)
    if unknown := list(without(beside, *heads)):
        raise Misfit(f"left over {named(unknown)}")
    return inside


def backbone_of(state: State, unused: tuple[str, ...] = ()) -> tuple[State, State]:
    """The tensors of the backbone, without ``unused``, and those beside it, without prefixes of wrappers."""
    state = unwrapped(state)
    inside = strip(state, "backbone.")
    if not inside:
        return without(state, "head.", *unused), {}  # a backbone alone, perhaps with a classifier
    return without(inside, *unused), without(state, "backbone.")


def take(
    file: Container,
    networks: Mapping[str, State],
    subnet: str | None,
    *,
    default: str = "teacher",
    needed: tuple[str, ...] = NEEDED,
    lacking: tuple[str, ...] = (),
    interpolation: str = "dinov2",
) -> Checkpoint:
    """One network of a file as a checkpoint.

    A missing tensor would change the network that is built (a ViT without its ``norm`` is another ViT), so it
    is an error here.

    Args:
        networks: {teacher: ..., student: ...} under our names, those that exist; {"": ...} if the file gives
            no name.
        subnet: the network to take; None: ``default``, or the only one.
        needed: tensors that it has beside the blocks and the patch embedding.
        lacking: starts of names that it does not have.
        interpolation: ``pos_interpolation``.

    Raises:
        Misfit: the network is not there; names a tensor that is missing, left over, or of a shape that fits
            no such ViT; teacher and student differ in names or shapes (iBOT's mask token may be the student's
            alone).
    """
    if not networks:
        held = ", ".join(map(str, list(file.flat or file.tree)[:5]))
        raise Misfit(f"no network under the names of its files, but {held}")
    name = subnet or (default if default in networks else next(iter(networks)))
    if name not in networks:
        there = "one network that it gives no name" if "" in networks else f"only the {next(iter(networks))}"
        raise Misfit(f"subnet {name} is not there; the file holds {there}")
    state = networks[name]
    require(state, needed)
    if foreign := [key for key in state if key.startswith(lacking)]:
        raise Misfit(f"there is {named(foreign)}, which its networks have not")
    if interpolation == "dinov2" and starts_with_zero(state["pos_embed"]):
        raise Misfit("the first position in pos_embed is zero, as in MAE's fixed table; its own are learned")
    checkpoint = plain_vit(file, state, name, pos_interpolation=interpolation)
    shapes = [{(key, v.shape) for key, v in net.items() if key != "mask_token"} for net in networks.values()]
    if differing := sorted({key for key, _ in shapes[0] ^ shapes[-1]}):
        raise Misfit(f"teacher and student are not one network: they differ in {named(differing)}")
    return checkpoint


def plain_vit(
    file: Container, state: State, subnet: str | None = None, method: str = "", **model_kwargs: Any
) -> Checkpoint:
    """A checkpoint from a state dict under our names; the shapes tell most arguments of the ViT.

    Args:
        state: ``patch_embed.proj.*``, ``blocks.*`` (gated MLPs as ours, the gate first); and if there are any
            ``norm.*``, ``cls_norm.*``, ``local_cls_norm.*``, ``ls1/2.gamma``, ``cls_token`` [1, 1, D],
            ``reg_token`` [1, R, D], ``pos_embed`` [1, (1 +) G * G, D] with a row for [CLS] exactly when there is
            a ``cls_token``.
        method: for the provenance, if it is not that of the source.
        subnet: for the provenance, with the file's epoch counter; empty for a network without a name.
        model_kwargs: what shapes do not tell (``gelu``, ``ln_eps``, ``pos_interpolation``, ...), or what
            overrides them.

    Raises:
        Misfit: names a tensor that every ViT needs and that is absent, or of a shape that fits no ViT.
    """

    def shaped(key: str, n_dims: int) -> torch.Size:
        if key not in state:
            raise Misfit(f"no tensor {key}")
        if state[key].ndim != n_dims:
            raise Misfit(f"{key} is {tuple(state[key].shape)}, not of {n_dims} dimensions")
        return state[key].shape

    kernel = shaped("patch_embed.proj.weight", 4)
    if kernel[2] != kernel[3] or not kernel[0]:
        raise Misfit(f"patch_embed.proj.weight is {tuple(kernel)}, no square patch")
    width, has_cls = kernel[0], "cls_token" in state
    numbers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    depth = 1 + max((int(n) for n in numbers if n.isdecimal() and len(n) < 6), default=-1)
    if absent := [i for i in range(max(depth, 1)) if str(i) not in numbers]:
        raise Misfit(f"no tensor of blocks.{absent[0]}, but there are {depth} blocks")
    shaped("blocks.0.attn.qkv.weight", 2)
    hidden = shaped("blocks.0.mlp.fc1.weight", 2)[0]
    is_gated = shaped("blocks.0.mlp.fc2.weight", 2)[1] * 2 == hidden
    n_registers = shaped("reg_token", 3)[1] if "reg_token" in state else 0
    found: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads_of(width)}
    ratio = hidden / width / (2 if is_gated else 1)
    found |= {"mlp_ratio": ratio, "patch_size": kernel[2], "n_registers": n_registers}
    told = {"swiglu": is_gated} | {key: f"{key}.weight" in state for key in ("cls_norm", "local_cls_norm")}
    found |= {key: True for key, is_there in told.items() if is_there}
    found |= {"has_cls": has_cls, "final_norm": "norm.weight" in state}
    found["layerscale"] = 1e-5 if "blocks.0.ls1.gamma" in state else None
    found["pos_encoding"] = "standard" if "pos_embed" in state else "none"
    found["mask_tokens"] = "mask_token" in state and "pos_mask_token" in state
    if "pos_embed" in state and model_kwargs.get("pos_encoding") != "rotary":
        n_positions = shaped("pos_embed", 3)[1]
        found["pos_grid"] = grid_side(n_positions - has_cls)
        if not found["pos_grid"]:
            raise Misfit(f"pos_embed has {n_positions} positions, not {'1 + ' * has_cls}a square grid")
    provenance: dict[str, Any] = {"method": method} if method else {}
    provenance |= {"subnet": subnet} if subnet else {}
    if subnet is not None and type(file.tree.get("epoch")) is int:
        provenance["epoch"] = file.tree["epoch"]
    name, counted = registry_name(width, n_registers, is_gated), "depth" not in model_kwargs
    return Checkpoint(file.path, state, found | model_kwargs, name, provenance, counted)
