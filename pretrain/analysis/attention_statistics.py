"""How diverse and how far-reaching attention is: NMI and MAD (paper appendix A.1, Fig. 5; METHOD.md 8; Park
et al., 2023).

A [N (query), N (key)] is the patch-to-patch attention of one head, each row summing to 1.

* NMI, normalized mutual information of query and key: p(q, k) = A_qk / N, I / sqrt(H(q) H(k)). 0: all queries
  look at the same keys; 1: each looks at one key, and each at another. Since I = H(k) - mean_q H(A_q), one
  pass over the rows is enough. Where H(q) or H(k) is 0 (a single patch; all queries look at one and the same
  key) NMI is 0: it is at most sqrt(H(k) / H(q)).
* MAD, mean attention distance: mean over q of sum_k A_qk times the distance of the two patches' centers, in
  pixels.

:func:`nmi` and :func:`mad_px` are the plain form, of a whole A. :func:`attention_statistics` streams: beside
the network's own forward pass it holds ``block`` rows of the attention of one layer at a time, and so takes
about

    4 bytes * 3 * B * heads * block * (N + special tokens)

(the rows and two temporaries of their size; one more with relative positions), whatever the depth. ViT-B/16
at 480 px (N = 900, 12 heads), one image, blocks of 64: 8 MB, where all attention of that image would take 467
MB.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.attention import layer_inputs, over_patches
from pretrain.backbones.attention import Attention
from pretrain.backbones.vit import ViT

BLOCK = 64  # queries: on a CPU the fastest of 64, 128, 256 and all, for it stays in the cache


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
    rows, columns = torch.meshgrid(
        *(torch.arange(n, device=device, dtype=torch.float32) for n in grid), indexing="ij"
    )
    y, x = rows.flatten() * patch_px, columns.flatten() * patch_px  # [N]
    return ((y[queries, None] - y).square() + (x[queries, None] - x).square()).sqrt()


def nmi(attention: Tensor) -> Tensor:
    """NMI of attention [..., N (query), N (key)] whose rows sum to 1: [...], in [0, 1]."""
    return _nmi(_wide(entropy(attention)).mean(-1), _wide(attention).mean(-2), attention.shape[-2])


def mad_px(attention: Tensor, grid: tuple[int, int], patch_px: int) -> Tensor:
    """MAD in pixels of attention [..., N, N] over a grid (h, w), N = h * w, row-major: [...]."""
    distances = distances_px(grid, patch_px, device=attention.device)
    return _wide((attention * distances).sum(-1)).mean(-1)


def _nmi(row_entropy: Tensor, keys: Tensor, n: int) -> Tensor:
    """From mean_q H(A_q) [...] and p(k) [..., N]: the plain and the streamed form end alike."""
    key_entropy = entropy(keys)
    information = (
        (key_entropy - row_entropy).clamp(min=0).minimum(key_entropy)
    )  # rounding can leave the bounds
    scale = (math.log(n) * key_entropy).sqrt()
    return torch.where(scale > 0, information / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0)


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
    buckets = backbone.buckets(grid)
    layers = []
    for layer, entering in layer_inputs(backbone, tokens, buckets):
        blocks = row_blocks(layer.attn, layer.norm1(entering), backbone.n_prefix, buckets, block)
        layers.append(_streamed(blocks, grid, backbone.patch_size))
    nmis, mads = (torch.stack(values, dim=1).cpu().double() for values in zip(*layers))
    return Statistics(nmis, mads)


def row_blocks(
    attention: Attention, x: Tensor, n_prefix: int, buckets: Tensor | None, block: int
) -> Iterator[Tensor]:
    """Patch-to-patch attention of a layer's normed input [B, T, D], ``block`` queries at a time.

    Yields:
        [B, heads, M, N], float32 (float64 of a float64 model), the caller's to change.
    """
    q, k, _ = attention.heads(x)
    n_tokens = x.shape[1]
    for start in range(n_prefix, n_tokens, block):
        queries = slice(start, min(start + block, n_tokens))
        of_block = None if buckets is None else buckets[queries]
        yield over_patches(
            _at_least_float32(attention.weights(q[:, :, queries], k, of_block)), n_prefix
        )  # no name keeps a part


def _streamed(blocks: Iterator[Tensor], grid: tuple[int, int], patch_px: int) -> tuple[Tensor, Tensor]:
    """NMI and MAD [B, heads] from the rows of attention in order."""
    row_entropy = keys = distance = torch.zeros(())
    done = 0
    for rows in blocks:  # [B, heads, M, N]
        here = slice(done, done + rows.shape[2])
        row_entropy = row_entropy.to(rows.device) + _wide(entropy(rows)).sum(-1)  # [B, heads]
        keys = keys.to(rows.device) + _wide(rows.sum(-2))  # [B, heads, N]
        rows *= distances_px(grid, patch_px, here, rows.device)
        distance = distance.to(rows.device) + _wide(rows.sum(-1)).sum(-1)
        done = here.stop
        del rows  # before the next are made
    return _nmi(row_entropy / done, keys / done, done), distance / done


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _wide(x: Tensor) -> Tensor:
    """For sums over many: float64, but on MPS, which has none, float32."""
    return x.float() if x.device.type == "mps" else x.double()
