"""Attention of a pre-trained backbone, as the paper looks at it (appendix A, Fig. 6).

The analyses are of patch-to-patch attention: the special tokens are cut off and each row is renormalized
(METHOD.md 8).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.backbones.block import Block
from pretrain.backbones.vit import ViT


class LastLayer(NamedTuple):
    """What the last layer attends to and gives. Rows of attention are over the patches alone and sum to 1;
    mean of the heads."""

    cls: Tensor  # [B, N (key)]; of a ViT without [CLS] the mean over the patches
    patches: Tensor  # [B, N (query), N (key)]
    features: Tensor  # [B, N, D] patch tokens after the final norm


def over_patches(weights: Tensor, n_prefix: int) -> Tensor:
    """Rows of attention over the patches alone, summing to 1.

    A row that gives the patches nothing (all of it underflows beside a special token's) says nothing of them
    and becomes uniform: the limit of adding a small number to each weight, as the notebook of
    naver-ai/cl-vs-mim does.

    Args:
        weights: [..., n_prefix + N (key)].

    Returns:
        [..., N].
    """
    to_patches = weights[..., n_prefix:]
    total = to_patches.sum(-1, keepdim=True)
    return torch.where(total > 0, to_patches / total, 1 / to_patches.shape[-1])


def layer_inputs(backbone: ViT, tokens: Tensor, buckets: Tensor | None) -> Iterator[tuple[Block, Tensor]]:
    """Each block in turn, with the tokens [B, T, D] that enter it; what the last one makes of them is not
    computed.

    Args:
        tokens: of ``backbone.embed``.
        buckets: of ``backbone.buckets``.
    """
    previous: Block | None = None
    for block in backbone.blocks:
        assert isinstance(block, Block)
        tokens = tokens if previous is None else previous(tokens, buckets=buckets)
        yield block, tokens
        previous = block


@torch.no_grad()
def last_layer(
    backbone: ViT, x: Tensor, boxes: Tensor | None = None, flips: Tensor | None = None
) -> LastLayer:
    """Attention of the last layer, special tokens cut off and rows renormalized, and the patch features, in
    one pass.

    Args:
        x: [B, 3, H, W] normalized pixels.
        boxes, flips: [B, 4], [B]: position boxes of crops, none for whole images.
    """
    tokens, grid = backbone.embed(x, boxes, flips)
    buckets = backbone.buckets(grid)
    *_, (last, tokens) = layer_inputs(backbone, tokens, buckets)
    weights = last.attn.attention_map(last.norm1(tokens), buckets=buckets)  # [B, heads, T, T]
    rows = over_patches(weights, backbone.n_prefix).mean(1)  # [B, T, N]
    features = backbone.split(backbone.norm(last(tokens, buckets=buckets))).patches
    patches = rows[:, backbone.n_prefix :]
    return LastLayer(rows[:, 0] if backbone.has_cls else patches.mean(1), patches, features)


def last_layer_attention(backbone: ViT, x: Tensor) -> Tensor:
    """Patch-to-patch attention of :func:`last_layer`, [B, N (query), N (key)], for [B, 3, H, W] normalized
    pixels."""
    return last_layer(backbone, x).patches


def patch_at(place: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch at a place (x, y) in image units, in a grid (h, w)."""
    x, y = place
    return min(int(y * grid[0]), grid[0] - 1), min(int(x * grid[1]), grid[1] - 1)


@torch.no_grad()
def query_attention(backbone: ViT, x: Tensor, places: Sequence[tuple[float, float]]) -> Tensor:
    """What some query patches attend to in the last layer, mean of the heads (paper Fig. 6), without the rows
    of all others.

    Args:
        x: [B, 3, H, W] normalized pixels.
        places: (x, y) in image units, of Q queries.

    Returns:
        [B, Q, h, w], each map summing to 1.
    """
    tokens, grid = backbone.embed(x)
    buckets = backbone.buckets(grid)
    *_, (last, tokens) = layer_inputs(backbone, tokens, buckets)
    normed = last.norm1(tokens)
    rows = []
    for place in places:
        i, j = patch_at(place, grid)
        query = backbone.n_prefix + i * grid[1] + j
        weights = last.attn.attention_map(normed, slice(query, query + 1), buckets)  # [B, heads, 1, T]
        rows.append(over_patches(weights.float(), backbone.n_prefix).mean(1))  # [B, 1, N]
    return torch.cat(rows, dim=1).unflatten(2, grid)
