"""Public layouts with small networks, and timm's own model of the same weights as the oracle."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from backbone_fixture import randomize

from pretrain.build import build_backbone
from pretrain.errors import UserError

NAME, TINY = "vit_tiny_patch16", dict(embed_dim=192, depth=2, num_heads=3, num_classes=0)


def timm_vit(patch=14, grid=(7, 7), registers=0, seed=0, **model_kwargs):
    """A small ViT of timm's, every weight of ordinary size."""
    size = (patch * grid[0], patch * grid[1])
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **{
            **TINY,
            "patch_size": patch,
            "img_size": size,
            "reg_tokens": registers,
            "no_embed_class": bool(registers),
            **model_kwargs,
        },
    )
    return randomize(model, seed)


def at_grid(state, grid, rule, **model_kwargs):
    """timm's model of the same weights for another grid, its positions resampled by a restated rule."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    model = timm_vit(patch, grid, registers, **model_kwargs)
    n_prefix = 0 if registers or "cls_token" not in state else 1
    positions = state["pos_embed"]
    learned = positions[:, n_prefix:]
    side = math.isqrt(learned.shape[1])
    maps = (
        rule(learned.reshape(1, side, side, -1).permute(0, 3, 1, 2), grid)
        if (side, side) != tuple(grid)
        else None
    )
    learned = learned if maps is None else maps.flatten(2).transpose(1, 2)
    model.load_state_dict({**state, "pos_embed": torch.cat([positions[:, :n_prefix], learned], dim=1)})
    return model


def by_scale(maps, grid):
    """DINO's and DINOv2's rule."""
    scale = tuple((n + 0.1) / side for n, side in zip(grid, maps.shape[2:]))
    return F.interpolate(maps, scale_factor=scale, mode="bicubic")


def by_size(maps, grid):
    """Hugging Face's."""
    return F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)


def antialiased(maps, grid):
    """timm's, and DINOv2's with registers."""
    return F.interpolate(maps, size=grid, mode="bicubic", align_corners=False, antialias=True)


def images(grid, patch=14, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, grid[0] * patch, grid[1] * patch, generator=generator)


@torch.no_grad()
def features(path, x, **options):
    """[B, S + N, D] of our backbone from a file."""
    cls, registers, patches = build_backbone(NAME, weights=path, **options).eval()(x)
    return torch.cat([cls.unsqueeze(1), registers, patches], dim=1)


@torch.no_grad()
def theirs(model, x):
    return model.forward_features(x)


def refusal(path, **options):
    """What a user is told, the file's own name left out; it has to be there."""
    with pytest.raises(UserError) as error:
        build_backbone("vit_tiny_patch16", path, **options)
    before, after = str(error.value).split(str(path))
    return before + after
