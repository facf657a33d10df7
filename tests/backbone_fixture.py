"""Backbones whose every term counts."""

import torch

# What DINOv3's networks have and others do not, in a network of two blocks
ROTARY = dict(
    depth=2, pos_encoding="rotary", n_registers=4, layerscale=1e-2, ln_eps=1e-5, qkv_bias="no_key", swiglu=True,
    cls_norm=True, local_cls_norm=True,
)  # fmt: skip


def randomize(model, seed=0):
    """Weights of ordinary size everywhere, so that no term hides behind a zero initialization."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()
