"""timm's state dicts: the names that ours are made of, so that most public files are of this layout once unwrapped.

``vit_*_patch16_224.*``, ``vit_*_patch14_dinov2.lvd142m``, ``*_reg4_*`` (``reg_token``; ``no_embed_class``: the position of [CLS] is
already inside ``cls_token``). A classifier (``head.*``) is not the backbone's.
"""

import math

import torch

from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.container import Container
from pretrain.weights.layout import plain_vit, without
from pretrain.weights.sources.source import Evidence, Source

NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")


def recognise(file: Container) -> Evidence:
    """By the names alone, which many sources share."""
    return Evidence.POSSIBLE if all(key in file.flat for key in NEEDED) else Evidence.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """Resampled as timm does: bicubic by size, antialiased."""
    state = without(file.flat, "head.", "fc_norm.")
    if "reg_token" in state and math.isqrt(state["pos_embed"].shape[1]) ** 2 == state["pos_embed"].shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(state["pos_embed"][:, :1]), state["pos_embed"]], dim=1)
    return plain_vit(file.path, state, "timm", file.path.stem, pos_interpolation="bicubic_antialias")


SOURCES = (Source("timm", "timm", recognise, convert),)
