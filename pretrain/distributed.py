"""Ranks. At world size 1 every reduction is the identity: code reads the same on one machine and on many."""

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

_host: dist.ProcessGroup | None = None  # gloo, for what the hosts agree on without waiting for their devices


def start(device: str) -> None:
    """Join the process group that ``torchrun`` describes in the environment; without it, do nothing."""
    global _host
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        store, rank_, size = _rendezvous()
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if os.environ.get("GROUP_WORLD_SIZE") == "1" and restarts != "0":
            # The agent's store outlives the ranks that it starts again, with the addresses of the dead in it.
            # (On several machines agents count apart: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, set for
            # torchrun, gives each attempt a new store.)
            store = dist.PrefixStore(f"restart_{restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank_, world_size=size)
    if dist.is_initialized():
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _host = group


def _rendezvous() -> tuple[dist.Store, int, int]:
    """Where the ranks meet, this rank, and how many there are. ``torchrun``'s own store serves every address of the
    machine, as torch's does; one that the first rank serves on the loopback is there for this machine alone."""
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_agents or host != "localhost" and not host.startswith("127."):
        return next(dist.rendezvous("env://"))
    rank_, size, listener = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None
    if rank_ == 0:
        with socket.create_server((host, port), backlog=size) as server:
            listener = server.detach()
    store = dist.TCPStore(host, port, size, rank_ == 0, default_pg_timeout, master_listen_fd=listener)
    return store, rank_, size


def stop() -> None:
    """Leave the process group."""
    global _host
    if dist.is_initialized():
        dist.destroy_process_group()
        _host = None


def host_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks, none without a process group: its collectives never wait for a device."""
    return _host


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def local(x: Tensor) -> Tensor:
    """This rank's values: the shard of a DTensor, or a plain tensor itself."""
    return (
        x.to_local() if hasattr(x, "to_local") else x
    )  # to import DTensor, and sympy with it, takes a second


def whole(x: Tensor) -> Tensor:
    """All values of a DTensor, gathered from the ranks, which must call this at once; a plain tensor itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` (any shape) over the ranks; not differentiated."""
    return _reduced(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Largest of ``x`` (any shape) over the ranks, place by place; not differentiated."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, rule: Any) -> Tensor:
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, rule)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of ``x`` over the ranks; not differentiated."""
    return sum_over_ranks(x) / world_size()


def gather_objects(value: Any) -> list[Any]:
    """A plain value of each rank, in rank order, on all of them; every rank must call this at once."""
    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value, group=_host)
    return parts


def any_over_ranks(flag: bool) -> bool:
    """Whether the flag is set on some rank; every rank must call this at once. Does not wait for a device."""
    if world_size() == 1:
        return flag
    largest = torch.tensor([int(flag)])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host)
    return bool(largest)


def barrier() -> None:
    """All ranks wait for each other (hosts only)."""
    if world_size() > 1:
        dist.barrier(group=_host)


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
