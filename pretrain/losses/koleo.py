"""KoLeo: spreads the images' features over the sphere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed import gather_rows, rank
from pretrain.precision import at_least_float32


def koleo_loss(cls_tokens: Tensor, scope: str = "global", eps: float = 1e-8) -> Tensor:
    """KoLeo (Sablayrolles et al. 2019): -mean log distance to the nearest other sample, on normalized rows.

    Args:
        cls_tokens: [B, D] of one global view.
        scope: ``global``: neighbors over all ranks | ``local``: within this rank (DINOv2).
        eps: keeps the logarithm finite.

    Returns:
        a scalar; 0 for a single image.
    """
    with torch.autocast(device_type=cls_tokens.device.type, enabled=False):
        rows = F.normalize(at_least_float32(cls_tokens), dim=-1, eps=eps)
        others = gather_rows(rows) if scope == "global" else rows
        if len(others) < 2:
            return rows.sum() * 0.0  # a single image has no neighbor
        with torch.no_grad():
            similarity = rows @ others.T  # [B, W * B]
            first = rank() * len(rows) if scope == "global" else 0
            own = torch.arange(len(rows), device=rows.device)
            similarity[own, own + first] = -1
            nearest = F.one_hot(similarity.argmax(1), len(others)).to(rows.dtype)
        neighbor = nearest @ others  # a product, not an index: its backward pass is deterministic
        distance = F.pairwise_distance(rows, neighbor, eps=eps)
        return -torch.log(distance + eps).mean()
