"""Attention of a pre-trained backbone, as the paper looks at it (appendix A, Figs. 5 and 6; METHOD.md 8).

The analyses are of patch-to-patch attention: the special tokens are cut off and each row is renormalized.
A [N (query), N (key)] is that of one head, each row summing to 1. How diverse and how far-reaching it is
(Park et al., 2023):

* NMI, normalized mutual information of query and key: p(q, k) = A_qk / N, I / sqrt(H(q) H(k)). 0: all queries
  look at the same keys; 1: each looks at one key, and each at another. Since I = H(k) - mean_q H(A_q), one
  pass over the rows is enough. Where H(q) or H(k) is 0 (a single patch; all queries look at one and the same
  key) NMI is 0: it is at most sqrt(H(k) / H(q)).
* MAD, mean attention distance: mean over q of sum_k A_qk times the distance of the two patches' centers, in
  pixels.

:func:`attention_statistics` streams: beside the network's own forward pass it holds ``block`` rows of the
attention of one layer at a time, and so takes about

    4 bytes * 3 * B * heads * block * (N + special tokens)

(the rows and two temporaries of their size; one more with relative positions), whatever the depth. ViT-B/16
at 480 px (N = 900, 12 heads), one image, blocks of 64: 8 MB, where all attention of that image would take 467
MB.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.backbones.attention import Attention, Geometry, buckets_of
from pretrain.backbones.block import Block
from pretrain.backbones.vit import ViT

BLOCK = 64  # queries: on a CPU the fastest of 64, 128, 256 and all, for it stays in the cache


class LastLayer(NamedTuple):
    """What the last layer attends to (mean of the heads, over the patches alone, rows sum to 1) and gives."""

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


def layer_inputs(backbone: ViT, tokens: Tensor, geometry: Geometry) -> Iterator[tuple[Block, Tensor]]:
    """Each block in turn, with the tokens [B, T, D] that enter it; what the last one gives is not computed.

    Args:
        tokens, geometry: of ``backbone.embed`` and ``backbone.geometry``.
    """
    previous: Block | None = None
    for block in backbone.blocks:
        assert isinstance(block, Block)
        tokens = tokens if previous is None else previous(tokens, geometry=geometry)
        yield block, tokens
        previous = block


@torch.no_grad()
def last_layer(
    backbone: ViT, x: Tensor, boxes: Tensor | None = None, flips: Tensor | None = None
) -> LastLayer:
    """Attention of the last layer, and the patch features, in one pass.

    Args:
        x: [B, 3, H, W] normalized pixels.
        boxes, flips: [B, 4], [B]: position boxes of crops, none for whole images.
    """
    tokens, grid = backbone.embed(x, boxes, flips)
    geometry = backbone.geometry(grid, boxes, flips)
    *_, (last, tokens) = layer_inputs(backbone, tokens, geometry)
    weights = last.attn.attention_map(last.norm1(tokens), geometry=geometry)  # [B, heads, T, T]
    rows = over_patches(weights, backbone.n_prefix).mean(1)  # [B, T, N]
    features = backbone.split(backbone.norm(last(tokens, geometry=geometry))).patches
    patches = rows[:, backbone.n_prefix :]
    return LastLayer(rows[:, 0] if backbone.has_cls else patches.mean(1), patches, features)


def patch_at(place: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch at a place (x, y) in image units, in a grid (h, w)."""
    x, y = place
    return min(int(y * grid[0]), grid[0] - 1), min(int(x * grid[1]), grid[1] - 1)


@torch.no_grad()
def query_attention(backbone: ViT, x: Tensor, places: Sequence[tuple[float, float]]) -> Tensor:
    """What some query patches attend to in the last layer, mean of the heads (paper Fig. 6), and no others.

    Args:
        x: [B, 3, H, W] normalized pixels.
        places: (x, y) in image units, of Q queries.

    Returns:
        [B, Q, h, w], each map summing to 1.
    """
    tokens, grid = backbone.embed(x)
    geometry = backbone.geometry(grid)
    *_, (last, tokens) = layer_inputs(backbone, tokens, geometry)
    normed = last.norm1(tokens)
    rows = []
    for place in places:
        i, j = patch_at(place, grid)
        query = backbone.n_prefix + i * grid[1] + j
        weights = last.attn.attention_map(normed, slice(query, query + 1), geometry)  # [B, heads, 1, T]
        rows.append(over_patches(weights.float(), backbone.n_prefix).mean(1))  # [B, 1, N]
    return torch.cat(rows, dim=1).unflatten(2, grid)


class Statistics(NamedTuple):
    """NMI and MAD of each layer and head of some images, float64 on the CPU."""

    nmi: Tensor  # [B, L, heads]
    mad_px: Tensor  # [B, L, heads]


def entropy(p: Tensor) -> Tensor:
    """Of distributions [..., K], in nats: [...]. 0 log 0 is 0."""
    return -torch.special.xlogy(p, p).sum(-1)


def distances_px(
    grid: tuple[int, int], patch_px: int, queries: slice = slice(None), device: torch.device | None = None
) -> Tensor:
    """Distances between the centers of patches of a grid (h, w), [M (query), h * w] float32."""
    sides = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    y, x = rows.flatten() * patch_px, columns.flatten() * patch_px  # [N]
    return ((y[queries, None] - y).square() + (x[queries, None] - x).square()).sqrt()


@torch.no_grad()
def attention_statistics(backbone: ViT, x: Tensor, block: int = BLOCK) -> Statistics:
    """NMI and MAD of every layer and head, for whole images.

    Attention is computed in the precision of the model (or of autocast), its statistics in float32 (float64
    of a float64 model) and summed in float64 (on MPS, which has none, in float32).

    Args:
        backbone: in evaluation mode, on the device of ``x``.
        x: [B, 3, H, W] normalized pixels; H and W multiples of the patch size, else patches of padding count
            as patches.
        block: queries at a time; see the module's memory bound.
    """
    assert block > 0, block
    tokens, grid = backbone.embed(x)
    geometry = backbone.geometry(grid)
    layers = []
    for layer, entering in layer_inputs(backbone, tokens, geometry):
        blocks = row_blocks(layer.attn, layer.norm1(entering), backbone.n_prefix, geometry, block)
        layers.append(streamed_statistics(blocks, grid, backbone.patch_size))
    return Statistics(*(torch.stack(values, dim=1).cpu().double() for values in zip(*layers)))


def row_blocks(
    attention: Attention, x: Tensor, n_prefix: int, geometry: Geometry, block: int
) -> Iterator[Tensor]:
    """Patch-to-patch attention of a layer's normed input [B, T, D], ``block`` queries at a time.

    Yields:
        [B, heads, M, N], float32 (float64 of a float64 model), the caller's to change.
    """
    (q, k, _), exact = attention.heads(x, geometry), torch.promote_types(x.dtype, torch.float32)
    buckets = buckets_of(geometry)
    for start in range(n_prefix, x.shape[1], block):
        queries = slice(start, start + block)
        of_block = None if buckets is None else buckets[queries]
        # kept by no name
        yield over_patches(attention.weights(q[:, :, queries], k, of_block).to(exact), n_prefix)


def streamed_statistics(
    blocks: Iterable[Tensor], grid: tuple[int, int], patch_px: int
) -> tuple[Tensor, Tensor]:
    """NMI in [0, 1] and MAD in pixels, [...] each, from all rows of attention in order.

    Args:
        blocks: [..., M, N] each, rows summing to 1; they are changed.
        grid: (h, w) of the N patches, row-major.
    """
    row_entropy = keys = distance = torch.zeros(())
    done = 0
    for rows in blocks:
        here = slice(done, done + rows.shape[-2])
        wide = torch.float32 if rows.device.type == "mps" else torch.float64  # for sums over many
        row_entropy = row_entropy.to(rows.device) + entropy(rows).to(wide).sum(-1)  # [...]
        keys = keys.to(rows.device) + rows.sum(-2).to(wide)  # [..., N]
        rows *= distances_px(grid, patch_px, here, rows.device)
        distance = distance.to(rows.device) + rows.sum(-1).to(wide).sum(-1)
        done = here.stop
        del rows  # before the next are made
    key_entropy = entropy(keys / done)
    # Rounding can leave the bounds.
    information = (key_entropy - row_entropy / done).clamp(min=0).minimum(key_entropy)
    scale = (math.log(done) * key_entropy).sqrt()
    nmi = torch.where(scale > 0, information / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0)
    return nmi, distance / done
