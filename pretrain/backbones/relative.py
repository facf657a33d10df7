"""Contextual relative positions on the keys: iRPE (Wu et al., 2021, arXiv:2107.14222): method
"product", heads shared, ratio 1.9.

Distances along rows and along columns are each one of 7: 0, 1 patch, 2 or 3, farther, with signs (paper eq.
18). A pair of patches thus falls into one of 7 * 7 buckets; a pair with a special token falls into one more.
Each bucket has a learned vector, whose product with the query is added to the logit. We follow LoMaR (Chen et
al., 2022, arXiv:2206.00790), which differs from iRPE in one point that matters: it does not divide the query
by sqrt(d) first.

Memory: SDPA takes the sum as a float mask [B, heads, N, N] and so cannot use its flash kernel. Training keeps
one mask for each block, unless blocks are checkpointed. For ViT-B at 1024 px (N = 4097) that is, by
arithmetic, 403 MB an image and block in bfloat16, or 4.8 GB an image for 12 blocks. One block needs about 2
GB an image while it runs, as the gather is in float32. The buckets take 134 MB, once a pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.precision import at_least_float32

RATIO = 1.9
ALPHA, BETA, GAMMA = RATIO, 2 * RATIO, 8 * RATIO
REACH = int(BETA)  # of the buckets along one side: -3 ... 3
SIDE = 2 * REACH + 1
# the bucket of pairs with a special token; LoMaR has one such token, [CLS], and registers join it (ours)
SPECIAL = SIDE**2
N_BUCKETS = SPECIAL + 1


def piecewise_index(distance: Tensor) -> Tensor:
    """Signed distances in patches to -3 ... 3, long: up to ``ALPHA`` as they are, then their log (eq. 18)."""
    size = distance.abs().float()
    far = ALPHA + torch.log(size / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
    return distance.sign() * torch.where(size <= ALPHA, size, far.round().clamp(max=REACH)).long()


def relative_buckets(grid: tuple[int, int], n_special: int, device: torch.device | None = None) -> Tensor:
    """The bucket of each query (row) and key (column), [S + h * w, S + h * w] long.

    Args:
        grid: (h, w) of the patches, row-major.
        n_special: S, tokens before the first patch.
    """
    sides = (torch.arange(side, device=device) for side in grid)
    rows, columns = (piecewise_index(place[:, None] - place) + REACH for place in sides)  # [h, h], [w, w]
    patches = SIDE * rows[:, None, :, None] + columns[None, :, None, :]  # [h, w, h, w]
    return F.pad(patches.flatten(2).flatten(0, 1), (n_special, 0, n_special, 0), value=SPECIAL)


class RelativePositions(nn.Module):
    """What relative positions add to the logits (key ``lookup_table_weight`` [1, d, 50], at first zero)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_dim, N_BUCKETS))

    def forward(self, q: Tensor, buckets: Tensor) -> Tensor:
        """Query [B, heads, M, d], as projected, and buckets [M, N] -> [B, heads, M, N]."""
        products = q @ self.lookup_table_weight  # [B, heads, M, 50]
        # The gradient of a product sums over many keys in the gather's precision: bfloat16 would lose it.
        return at_least_float32(products).gather(-1, buckets.expand(*q.shape[:2], -1, -1)).to(q.dtype)
