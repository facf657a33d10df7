"""Precision of an operation: losses and norms in float32 or better, matrix products in autocast's dtype, logits in
float16 where that costs nothing."""

import torch
from torch import Tensor

# Devices that multiply float16 as fast as bfloat16; a CPU takes many times as long
FLOAT16_IS_FAST = ("cuda",)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with ``x``: autocast's where that is on, else that of ``x``."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def logits_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product that makes logits of ``x``: float16 where autocast's is bfloat16 and the device
    is of :data:`FLOAT16_IS_FAST` (as DINOv2's), else :func:`product_dtype`.

    Its eleven bits cost a temperature of 0.04 a KL of 1e-5, the eight of bfloat16 6e-4 (METHOD.md 5).
    """
    dtype = product_dtype(x)
    return torch.float16 if dtype == torch.bfloat16 and x.device.type in FLOAT16_IS_FAST else dtype
