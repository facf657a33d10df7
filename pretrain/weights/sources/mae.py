"""MAE, and DropPos on its code: encoders with a fixed sin-cos table of positions and a zero for [CLS].

MAE: ``{model: encoder}``, or with ``decoder_*`` and a mask token of the decoder's width (``models_mae.py``).
DropPos:
``{state_dict: module.*, model: a name, ...}`` or ``{model}``, and ``ema_state_dict`` in runs with a teacher,
which its authors evaluate only on demand (``main_finetune.py``). Its ``mask_pos_token`` replaces a dropped
position. Both resample positions bicubically by size (``util/pos_embed.py``).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.backbones.position import sincos_table
from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.container import Container, is_state
from pretrain.weights.layout import strip, without
from pretrain.weights.sources.dino import State, is_named, marks_of, take
from pretrain.weights.sources.source import Match, Source

MAE_UNUSED = ("decoder_", "mask_token")
DROPPOS_UNUSED = (*MAE_UNUSED, "aux_decoder_", "mask_pos_token")


def match_mae(file: Container) -> Match:
    """By the decoder of pixels; an encoder alone, by the fixed positions under ``model``."""
    state = file.flat if is_state(file.tree.get("model")) else {}
    if any("mae" not in sources for sources, _ in marks_of(file)):
        return Match.NONE
    if "decoder_pred.weight" in state and "decoder_pos_embed" in state:
        return Match.MARKED
    if not is_fixed(state):
        return Match.NONE
    return Match.NAMED if is_named(file, "mae") else Match.POSSIBLE


def match_droppos(file: Container) -> Match:
    """By the token of dropped positions; an encoder alone, which may come from any descendant of MAE, by the
    file's name."""
    state = next(iter(_droppos_networks(file).values()), {})
    if "mask_pos_token" in state:
        return Match.MARKED
    return Match.NAMED if is_fixed(state) and is_named(file, "droppos") else Match.NONE


def convert_mae(file: Container, subnet: str | None) -> Checkpoint:
    """The encoder."""
    return _encoder(file, {"": file.flat} if file.flat else {}, subnet, "mae", "MAE", MAE_UNUSED)


def convert_droppos(file: Container, subnet: str | None) -> Checkpoint:
    """The trained encoder, or ``teacher``, its moving average."""
    networks = _droppos_networks(file)
    if any("decoder_pos_embed" in state for state in networks.values()):
        raise UserError(
            f"weights: {file.path}, read as droppos: its decoder knows positions (decoder_pos_embed), DropPos's does not"
        )
    return _encoder(file, networks, subnet, "droppos", "DropPos", DROPPOS_UNUSED)


def is_fixed(state: Mapping[str, Tensor], has_cls: bool = True) -> bool:
    """Whether ``pos_embed`` is :func:`sincos_table` up to half precision, after a zero for [CLS] where there
    is a row for it."""
    positions = state.get("pos_embed")
    if (
        positions is None
        or positions.ndim != 3
        or len(positions) != 1
        or positions.shape[2] % 4
        or positions.shape[1] <= has_cls
    ):
        return False
    side = math.isqrt(positions.shape[1] - has_cls)
    table = sincos_table(side, positions.shape[2])
    if has_cls:
        table = torch.cat([torch.zeros_like(table[:1]), table])
    return table.shape == positions.shape[1:] and torch.allclose(positions[0].double(), table, atol=1e-3)


def _droppos_networks(file: Container) -> dict[str, State]:
    """The networks of a run without DDP's prefix; a file of one network gives it no name."""
    found = {"": file.flat} if file.flat else {}
    if found and is_state(file.tree.get("ema_state_dict")):
        found = {"student": file.flat, "teacher": dict(file.tree["ema_state_dict"])}
    stripped = {name: strip(state, "module.") for name, state in found.items()}
    return {
        name: stripped[name] if len(stripped[name]) == len(state) else state for name, state in found.items()
    }


def _encoder(
    file: Container,
    networks: dict[str, State],
    subnet: str | None,
    source: str,
    method: str,
    unused: tuple[str, ...],
) -> Checkpoint:
    """The encoder of a network, whose positions have to be the fixed ones."""
    encoders = {name: without(state, *unused) for name, state in networks.items()}
    checkpoint = take(file, encoders, subnet, source, method, default="student", interpolation="bicubic")
    if not is_fixed(checkpoint.state):
        raise UserError(
            f"weights: {file.path}, read as {source}: pos_embed is not {method}'s fixed sin-cos table"
        )
    return checkpoint


SOURCES = (
    Source("mae", "MAE", match_mae, convert_mae),
    Source("droppos", "DropPos", match_droppos, convert_droppos),
)
