"""How the ranks share a step: one process, DDP (every rank holds everything), or FSDP2 (parameters and optimiser are sharded)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from pretrain import distributed


class Ranks:
    """Calls a method's forward pass so that the gradients of all ranks are averaged.

    Args:
        method: has ``student`` and ``teacher``, ModuleDicts of a ViT (``backbone``) and heads.
        rule: ``ddp`` | ``fsdp2``; one process alone needs neither.
        compiled: torch.compile every block.
    """

    def __init__(self, method: nn.Module, rule: str, compiled: bool = False) -> None:
        self.method: nn.Module = method
        self.is_sharded = distributed.world_size() > 1 and rule == "fsdp2"
        if compiled:
            for network in (method.student, method.teacher):
                for block in network["backbone"].blocks:  # type: ignore[index, operator, union-attr]
                    block.compile()
        if self.is_sharded:
            for network in (method.student, method.teacher):
                _shard(network)  # type: ignore[arg-type]
            self.call: nn.Module = method
        elif distributed.world_size() > 1:
            # Which parameters get a gradient does not change from step to step; centres are kept equal by their own reduction.
            self.call = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)
        else:
            self.call = method

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        """The method's forward pass."""
        terms: dict[str, Tensor] = self.call(*arguments)
        return terms

    def averaging(self, now: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass: whether its gradients, with those before, are averaged over the ranks in it."""
        if isinstance(self.call, DistributedDataParallel) and not now:
            return self.call.no_sync()
        return self._sharded_averaging(now) if self.is_sharded else nullcontext()

    def reshard(self) -> None:
        """Give back what a forward pass gathered and no backward pass has: the teacher's, before it is moved and saved."""
        if self.is_sharded:
            for network in (self.method.student, self.method.teacher):
                for module in network.values():  # type: ignore[operator, union-attr]
                    assert isinstance(module, FSDPModule)
                    module.reshard()

    @contextmanager
    def _sharded_averaging(self, now: bool) -> Iterator[None]:
        for module in self.method.student.values():  # type: ignore[operator, union-attr]
            assert isinstance(module, FSDPModule)
            module.set_requires_gradient_sync(now)
        yield


def _shard(network: nn.ModuleDict) -> None:
    """FSDP2 over all ranks: each block, what is left of the backbone, and each head is a unit."""
    device = next(network.parameters()).device.type
    mesh = init_device_mesh(device, (distributed.world_size(),))
    for block in network["backbone"].blocks:  # type: ignore[union-attr, operator]
        fully_shard(block, mesh=mesh)
    for module in network.values():
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(network["backbone"], "forward_views")
