"""Attention of a pre-trained backbone, as the paper looks at it (appendix A, Fig. 6)."""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.backbones.block import Block
from pretrain.backbones.vit import ViT


class LastLayer(NamedTuple):
    """What the last layer attends to and gives. Rows of attention are over the patches alone and sum to 1; mean of the heads."""

    cls: Tensor  # [B, N (key)]; of a ViT without [CLS] the mean over the patches
    patches: Tensor  # [B, N (query), N (key)]
    features: Tensor  # [B, N, D] patch tokens after the final norm


@torch.no_grad()
def last_layer(backbone: ViT, x: Tensor, boxes: Tensor | None = None, flips: Tensor | None = None) -> LastLayer:
    """Attention of the last layer, special tokens cut off and rows renormalised, and the patch features, in one pass.

    Args:
        x: [B, 3, H, W] normalised pixels.
        boxes, flips: [B, 4], [B]: position boxes of crops, none for whole images.
    """
    tokens, _ = backbone.embed(x, boxes, flips)
    *blocks, last = backbone.blocks
    for block in blocks:
        tokens = block(tokens)
    assert isinstance(last, Block)
    weights = last.attn.attention_map(last.norm1(tokens))  # [B, heads, T, T]
    first_patch = backbone.n_prefix
    to_patches = weights[..., first_patch:]
    rows = (to_patches / to_patches.sum(-1, keepdim=True)).mean(1)  # [B, T, N]
    features = backbone.split(backbone.norm(last(tokens))).patches
    patches = rows[:, first_patch:]
    return LastLayer(rows[:, 0] if backbone.has_cls else patches.mean(1), patches, features)


def last_layer_attention(backbone: ViT, x: Tensor) -> Tensor:
    """Patch-to-patch attention of :func:`last_layer`, [B, N (query), N (key)], for [B, 3, H, W] normalised pixels."""
    return last_layer(backbone, x).patches
