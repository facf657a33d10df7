"""How the ranks share a step: one process, DDP (every rank holds everything), or FSDP2 (parameters and
optimizer are sharded)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from pretrain import distributed
from pretrain.backbones.block import Block
from pretrain.settings import Settings, setting


class StepSettings(Settings):
    """How a step is computed: the same losses and gradients, but for what ``accumulate`` says of what is
    drawn."""

    in_recipe = False
    fixed = False

    accumulate: int = setting(
        1,
        "micro-batches of a rank's batch, in turn; each draws its own dropped paths, koleo_scope=local looks within one",
        source="ours",
        ge=1,
    )
    checkpointing: Literal["none", "full", "selective"] = setting(
        "none",
        "none | full (blocks are computed again in the backward pass) | selective (matrix products are kept)",
        source="ours",
    )
    compile: bool = setting(False, "torch.compile, block by block", source="ours")
    parallel: Literal["ddp", "fsdp2"] = setting(
        "ddp", "several ranks: ddp | fsdp2 (sharded parameters and optimizer)", source="ours"
    )
    on_nan: Literal["stop", "skip"] = setting(
        "stop",
        "a loss or gradient that is not finite: stop | skip (that step changes nothing)",
        source="ours",
    )


class Ranks:
    """Calls a method's loss so that the gradients of all ranks are averaged.

    Args:
        method: its children that are ModuleDicts are networks of a ViT (``backbone``) and what stands on it;
            ``student`` learns.
        rule: ``ddp`` | ``fsdp2``; one process alone needs neither.
        compiled: torch.compile every block.
    """

    def __init__(self, method: nn.Module, rule: str, compiled: bool = False) -> None:
        self.student: Any = method.student
        self.networks: list[Any] = [child for child in method.children() if isinstance(child, nn.ModuleDict)]
        self.is_sharded = distributed.world_size() > 1 and rule == "fsdp2"
        if compiled:
            for network in self.networks:
                for module in network.modules():
                    if isinstance(module, Block):
                        module.compile()
        self.call: nn.Module = method
        if self.is_sharded:
            for network in self.networks:
                _shard(network)
        elif distributed.world_size() > 1:
            # Which parameters get a gradient does not change from step to step; centers are kept equal by
            # their own reduction.
            self.call = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, *arguments: Any) -> Any:
        """The method's loss."""
        return self.call(*arguments)

    def averaging(self, now: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass: whether its gradients, with those before, are averaged over
        the ranks in it."""
        if isinstance(self.call, DistributedDataParallel) and not now:
            return self.call.no_sync()
        return self._sharded_averaging(now) if self.is_sharded else nullcontext()

    def reshard(self) -> None:
        """Give back what a forward pass gathered and no backward pass has: the teacher's, before it is
        moved and saved."""
        if self.is_sharded:
            for network in self.networks:
                for module in network.values():
                    assert isinstance(module, FSDPModule)
                    module.reshard()

    @contextmanager
    def _sharded_averaging(self, now: bool) -> Iterator[None]:
        for module in self.student.values():
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
