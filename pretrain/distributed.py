"""Ranks. Every reduction here is the identity at world size 1, so the code around it reads the same on one machine and on many."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str) -> None:
    """Join the process group that ``torchrun`` describes in the environment; without it, do nothing."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def say(text: str) -> None:
    """One line on stderr, from the main process."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` (any shape) over the ranks; not differentiated."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of ``x`` over the ranks; not differentiated."""
    return sum_over_ranks(x) / world_size()


def union_over_ranks(names: set[str]) -> set[str]:
    """The names of all ranks; every rank must call this at the same time."""
    if world_size() == 1:
        return set(names)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, sorted(names))
    return {name for part in parts for name in part}


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, [B, D] -> [W * B, D]; the backward pass sums what every rank asks of our rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [B, D] -> [W * B, D], differentiable."""
    return x if world_size() == 1 else _GatherRows.apply(x)
