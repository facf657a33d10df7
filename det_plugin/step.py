"""What a training step is in either engine: parts of a batch, gradients of all ranks, losses that must be
finite."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain import distributed
from pretrain.errors import UserError


def micro_batch_size(batch_size: int, accumulate: int) -> int:
    """Images that one rank computes on at a time.

    Raises:
        UserError: the batch cannot be shared equally by ranks and parts.
    """
    ranks = distributed.world_size()
    if accumulate < 1 or batch_size % (ranks * accumulate):
        parts = f"{ranks} processes x accumulate={accumulate}"
        raise UserError(f"protocol: batch_size={batch_size} cannot be shared by {parts}")
    return batch_size // (ranks * accumulate)


def averaging(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Around a forward and backward pass: whether the ranks average their gradients after it."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def mean_losses(terms: Sequence[Mapping[str, Tensor]], iteration: int) -> dict[str, float]:
    """Means of the losses over micro-batches and ranks.

    Args:
        terms: scalars by name, of each micro-batch.

    Raises:
        FloatingPointError: one is not finite; names the iteration and the losses.
    """
    means = torch.stack([torch.stack([term[name].detach() for term in terms]).mean() for name in terms[0]])
    values = dict(zip(terms[0], distributed.mean_over_ranks(means).tolist()))
    if not all(map(math.isfinite, values.values())):
        named = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise FloatingPointError(f"iteration {iteration}: a loss is no number ({named})")
    return values
