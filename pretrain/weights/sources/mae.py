"""MAE, and DropPos and LoMaR on its code.

MAE and DropPos are encoders with a fixed sin-cos table of positions and a zero for [CLS], which they resample
bicubically by size (``util/pos_embed.py``). MAE: ``{model: encoder}``, or with ``decoder_*`` and a mask token
of the decoder's width (``models_mae.py``). DropPos: ``{state_dict: module.*, model: a name, ...}`` or
``{model}``, and ``ema_state_dict`` in runs with a teacher, which its authors evaluate only on demand
(``main_finetune.py``). Its ``mask_pos_token`` replaces a dropped position.

LoMaR (Chen et al., 2022) has contextual relative positions (iRPE) in place of absolute ones. The source reads
the files of its pre-training, ``{model, optimizer, epoch, scaler, args}``. Two of their entries are not part
of the encoder: ``encoder_pred``, which predicts pixels, and ``pos_embed``, a sin-cos table that the network
holds and never adds.
"""

from pretrain.backbones.relative import N_BUCKETS
from pretrain.weights.common import (
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    is_fixed,
    is_named,
    plain_vit,
    take,
    unwrapped,
    without,
)
from pretrain.weights.container import Container, is_state
from pretrain.weights.sources.dino import marks_of

RELATIVE = ".attn.rpe_"  # of any variant of iRPE
LOMAR_TABLE = ".attn.rpe_k.lookup_table_weight"  # of LoMaR's
UNUSED = ("decoder_", "mask_token")
DROPPOS_UNUSED = (*UNUSED, "aux_decoder_", "mask_pos_token")


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
    return _encoder(file, file.alone, subnet, UNUSED)


def convert_droppos(file: Container, subnet: str | None) -> Checkpoint:
    """The trained encoder, or ``teacher``, its moving average."""
    networks = _droppos_networks(file)
    if any("decoder_pos_embed" in state for state in networks.values()):
        raise Misfit("its decoder knows positions (decoder_pos_embed), DropPos's does not")
    return _encoder(file, networks, subnet, DROPPOS_UNUSED)


def _droppos_networks(file: Container) -> dict[str, State]:
    """The networks of a run without DDP's prefix; a file of one network gives it no name."""
    found = file.alone
    if found and is_state(file.tree.get("ema_state_dict")):
        found = {"student": file.flat, "teacher": dict(file.tree["ema_state_dict"])}
    return {name: unwrapped(state) for name, state in found.items()}


def _encoder(
    file: Container, networks: dict[str, State], subnet: str | None, unused: tuple[str, ...]
) -> Checkpoint:
    """The encoder of a network, whose positions have to be the fixed ones."""
    encoders = {name: without(state, *unused) for name, state in networks.items()}
    checkpoint = take(file, encoders, subnet, default="student", interpolation="bicubic")
    if not is_fixed(checkpoint.state):
        raise Misfit("pos_embed is not its fixed sin-cos table")
    return checkpoint


def match_lomar(file: Container) -> Match:
    """By iRPE's tables in the blocks."""
    return Match.MARKED if any(RELATIVE in key for key in file.tensors("model") or {}) else Match.NONE


def convert_lomar(file: Container, subnet: str | None) -> Checkpoint:
    """The encoder with its mask token."""
    state = file.tensors("model") or {}
    _refuse_other_variants(state)
    state = without(state, "encoder_pred.", "pos_embed")
    if "mask_token" in state:  # [1, D]; like ours, it replaces a patch's content
        state["mask_token"] = state["mask_token"].squeeze(0)
    return plain_vit(file, state, relative_positions=True)


def _refuse_other_variants(state: State) -> None:
    tables = {key: tuple(table.shape) for key, table in state.items() if RELATIVE in key}
    for key, shape in tables.items():
        if not key.endswith(LOMAR_TABLE):
            raise Misfit(
                f"{key}: of iRPE's variants only LoMaR's is supported, contextual, product, on keys alone"
            )
        if len(shape) != 3 or shape[0] != 1 or shape[2] != N_BUCKETS:
            wanted = f"(1, head width, {N_BUCKETS}), one table for all heads of 7 x 7 + 1 buckets"
            raise Misfit(f"{key} is {shape}; LoMaR's are {wanted}")
    if not tables:
        raise Misfit(f"no tensor blocks.N{LOMAR_TABLE}")
    if "encoder_pred.weight" not in state:
        reason = "iRPE's own DeiT has the same tables, but it scales the query first and adds pos_embed: another network"
        raise Misfit(f"no tensor encoder_pred.weight, which LoMaR's pre-training leaves; {reason}")


SOURCES = (
    Source("mae", "MAE", match_mae, convert_mae),
    Source("droppos", "DropPos", match_droppos, convert_droppos),
    Source("lomar", "LoMaR", match_lomar, convert_lomar),
)
