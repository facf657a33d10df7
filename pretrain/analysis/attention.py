"""Attention of a pre-trained backbone, as the paper looks at it (appendix A, Fig. 6)."""

import torch
from torch import Tensor

from pretrain.backbones.vit import Block, ViT


@torch.no_grad()
def last_layer_attention(backbone: ViT, x: Tensor) -> Tensor:
    """Patch-to-patch attention of the last layer: special tokens cut off, rows renormalised, mean over the heads.

    Args:
        x: [B, 3, H, W] normalised pixels.

    Returns:
        [B, N (query), N (key)], rows summing to 1.
    """
    tokens, _ = backbone.embed(x)
    *blocks, last = backbone.blocks
    for block in blocks:
        tokens = block(tokens)
    assert isinstance(last, Block)
    weights = last.attn.attention_map(last.norm1(tokens))  # [B, heads, T, T]
    first_patch = 1 + backbone.n_registers
    patches = weights[:, :, first_patch:, first_patch:]
    return (patches / patches.sum(-1, keepdim=True)).mean(1)
