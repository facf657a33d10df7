"""Backbones whose every term counts."""

import re

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


def sharp(model):
    """Random, of ours, timm's or transformers', with attention that sees where patches are, and branches that count."""
    randomize(model)
    for name, parameter in model.named_parameters():
        if re.search(r"norm\w*\.weight$", name):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        if re.search(r"(qkv|query|key|value|[qkv]_proj)\.weight$", name):
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
        if re.search(r"(gamma(_[12])?|lambda1)$", name):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.1)
    return model.eval()
