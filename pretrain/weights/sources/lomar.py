"""LoMaR (Chen et al., 2022): a ViT with contextual relative positions (iRPE) in place of absolute ones.

The source reads the files of its pre-training, ``{model, optimizer, epoch, scaler, args}``. Two of their
entries are not part of the encoder: ``encoder_pred``, which predicts pixels, and ``pos_embed``, a sin-cos
table that the network holds and never adds.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pretrain.backbones.relative import N_BUCKETS
from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.container import Container
from pretrain.weights.layout import plain_vit, without
from pretrain.weights.sources.source import Match, Source

MARK = ".attn.rpe_"  # of any variant of iRPE
TABLE = ".attn.rpe_k.lookup_table_weight"  # of LoMaR's


def match(file: Container) -> Match:
    """By iRPE's tables in the blocks."""
    return Match.MARKED if any(MARK in key for key in file.tensors("model") or {}) else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The encoder with its mask token."""
    state = file.tensors("model") or {}
    _refuse_other_variants(file.path, state)
    state = without(state, "encoder_pred.", "pos_embed")
    if "mask_token" in state:
        # [1, D]; like ours, it replaces a patch's content
        state["mask_token"] = state["mask_token"].squeeze(0)
    return plain_vit(file.path, state, "lomar", "LoMaR", relative_positions=True)


def _refuse_other_variants(path: Path, state: Mapping[str, Tensor]) -> None:
    said = f"weights: {path}, read as lomar:"
    tables = {key: table for key, table in state.items() if MARK in key}
    for key, table in tables.items():
        if not key.endswith(TABLE):
            raise UserError(
                f"{said} {key}: of iRPE's variants only LoMaR's is supported, contextual, product, on keys alone"
            )
        if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != N_BUCKETS:
            shape = f"(1, head width, {N_BUCKETS}), one table for all heads"
            raise UserError(f"{said} {key} is {tuple(table.shape)}; LoMaR's are {shape} of 7 x 7 + 1 buckets")
    if not tables:
        raise UserError(f"{said} no tensor blocks.N{TABLE}")
    if "encoder_pred.weight" not in state:
        reason = "iRPE's own DeiT has the same tables, but it scales the query first and adds pos_embed: another network"
        raise UserError(f"{said} no tensor encoder_pred.weight, which LoMaR's pre-training leaves; {reason}")


SOURCES = (Source("lomar", "LoMaR", match, convert),)
