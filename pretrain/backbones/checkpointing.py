"""Activation checkpointing of a block: less memory, the same numbers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.backbones.attention import Buckets, Shapes

CHECKPOINTINGS = ("none", "full", "selective")

_ATEN = torch.ops.aten
_KEPT = {  # what is most expensive to recompute: matrix products and attention kernels
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(
    block: nn.Module, x: Tensor, shapes: Shapes, paths: Tensor | None, rule: str, buckets: Buckets = None
) -> Tensor:
    """A block on packed rows [T, D].

    Args:
        paths: [2, T, 1] or None, see :class:`pretrain.backbones.block.Block`; the caller draws them, so
            nothing is drawn twice.
        rule: ``none`` | ``full``: the backward pass recomputes the whole block | ``selective``: all but
            matrix products and attention.
        buckets: one for each length, see the block.
    """
    assert rule in CHECKPOINTINGS, rule
    if rule == "none" or not torch.is_grad_enabled():
        return block(x, shapes, paths, buckets)  # type: ignore[no-any-return]
    context: dict[str, Any] = {}
    if rule == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    out: Tensor = checkpoint(
        block, x, shapes, paths, buckets, use_reentrant=False, preserve_rng_state=False, **context
    )
    return out
