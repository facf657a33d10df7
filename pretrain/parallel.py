"""How ranks share a step: one process, DDP (each holds everything), FSDP2 (sharded weights and optimizer)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pretrain import distributed
from pretrain.backbones.block import Block
from pretrain.settings import Settings, setting


class StepSettings(Settings):
    """How a step is computed: the same losses and gradients, but for what ``accumulate`` says of drawing."""

    in_recipe = False
    fixed = False

    accumulate: int = setting(
        1,
        "micro-batches of a rank's batch, in turn; each draws its own dropped paths, koleo_scope=local looks within one; "
        "0: the fewest that fit into the GPU's memory",
        ge=0,
    )
    checkpointing: Literal["none", "full", "selective"] = setting(
        "none",
        "none | full (blocks are computed again in the backward pass) | selective (matrix products are kept)",
    )
    compile: bool = setting(False, "torch.compile, block by block")
    parallel: Literal["ddp", "fsdp2"] = setting(
        "ddp", "several ranks: ddp | fsdp2 (sharded parameters and optimizer)"
    )
    on_nan: Literal["stop", "skip"] = setting(
        "stop", "a loss or gradient that is not finite: stop | skip (that step changes nothing)"
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
            for module in method.modules():
                if isinstance(module, Block):
                    module.compile()
        self.call: nn.Module = method
        if self.is_sharded:
            for network in self.networks:
                _shard(network)
        elif distributed.world_size() > 1:
            # The parameters that get a gradient never change; centers are kept equal by their own reduction.
            self.call = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, *arguments: Any) -> Any:
        """The method's loss."""
        return self.call(*arguments)

    def averaging(self, now: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass: whether the ranks average its gradients, with those before."""
        if self.is_sharded:
            for module in self.student.values():
                module.set_requires_gradient_sync(now)
        if isinstance(self.call, DistributedDataParallel) and not now:
            return self.call.no_sync()
        return nullcontext()

    def reshard(self) -> None:
        """Give back what a forward pass gathered and no backward pass has: the teacher's, before it moves."""
        if self.is_sharded:
            for network in self.networks:
                for module in network.values():
                    module.reshard()


def _shard(network: nn.ModuleDict) -> None:
    """FSDP2 over all ranks: each block, what is left of the backbone, and each head is a unit."""
    from torch.distributed.device_mesh import init_device_mesh  # a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(network.parameters()).device.type
    mesh = init_device_mesh(device, (distributed.world_size(),))
    for block in network["backbone"].blocks:  # type: ignore[union-attr, operator]
        fully_shard(block, mesh=mesh)
    for module in network.values():
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(network["backbone"], "forward_views")
