"""The public methods' networks and checkpoints, restated: their names of parameters, their forward passes,
their wrappers of files.

Written from the methods' papers and public code, on plain torch: nothing of ours, nothing of timm's. Small:
192 wide, 2 blocks.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS = 192, 3


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, n, dim = x.shape
        q, k, v = self.qkv(x).view(batch, n, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / (dim // HEADS) ** 0.5).softmax(3)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, n, dim))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))


class Block(nn.Module):
    """``layerscale``: "" for none, ``ibot`` (gamma_1, gamma_2) or ``dinov2`` (ls1.gamma, ls2.gamma)."""

    def __init__(self, dim, layerscale=""):
        super().__init__()
        self.layerscale = layerscale
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim)
        if layerscale == "ibot":
            self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        elif layerscale == "dinov2":
            self.ls1, self.ls2 = Scale(dim), Scale(dim)

    def forward(self, x):
        first, second = 1.0, 1.0
        if self.layerscale:
            first, second = (
                (self.gamma_1, self.gamma_2)
                if self.layerscale == "ibot"
                else (self.ls1.gamma, self.ls2.gamma)
            )
        x = x + first * self.attn(self.norm1(x))
        return x + second * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)


class DinoViT(nn.Module):
    """DINO's, also that of CrIBo and CrOC: positions of another grid by scale factors with 0.1 added to
    the grid's sides."""

    def __init__(self, depth=2, patch=16, side=14, layerscale="", dim=WIDTH):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, dim))
        self.patch_embed = PatchEmbed(patch, dim)
        self.blocks = nn.ModuleList(Block(dim, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def resampled(self, positions, grid):
        """[1, G * G, D] -> [1, h * w, D]."""
        side = int(positions.shape[1] ** 0.5)
        if grid == (side, side):
            return positions
        maps = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(
            maps, scale_factor=((grid[0] + 0.1) / side, (grid[1] + 0.1) / side), mode="bicubic"
        )
        return maps.permute(0, 2, 3, 1).flatten(1, 2)

    def patches_in(self, image):
        """Embedded patches [B, N, D], without positions, and their grid."""
        maps = self.patch_embed.proj(image)
        return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])

    def forward(self, image):
        """[CLS] [B, D] and patches [B, N, D] as the method evaluates them."""
        x, grid = self.patches_in(image)
        x = x + self.resampled(self.pos_embed[:, 1:], grid)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


class IbotStudent(DinoViT):
    """The student's mask token is a vector [1, D]."""

    def __init__(self, **options):
        super().__init__(**options)
        self.masked_embed = nn.Parameter(torch.zeros(1, WIDTH))


class MugsViT(DinoViT):
    """A further block relates images to each other; the backbone's features do not see it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.relation_blocks = nn.ModuleList([Block(WIDTH)])


class SelfPatchViT(DinoViT):
    """No [CLS], no norm at the end."""

    def __init__(self):
        super().__init__()
        del self.cls_token, self.norm
        self.pos_embed = nn.Parameter(torch.zeros(1, 14**2, WIDTH))

    def forward(self, image):
        x, grid = self.patches_in(image)
        x = x + self.resampled(self.pos_embed, grid)
        for block in self.blocks:
            x = block(x)
        return x.mean(1), x


class FlslViT(DinoViT):
    """[CLS] is there and unused; fixed positions; a norm at the end if ``post_layernorm``."""

    def __init__(self, post_layernorm=True):
        super().__init__()
        self.cls_token.requires_grad_(False)
        self.pos_embed = nn.Parameter(sincos(14, WIDTH).unsqueeze(0), requires_grad=False)
        if not post_layernorm:
            self.norm = nn.Identity()

    def forward(self, image):
        x, grid = self.patches_in(image)
        x = x + self.resampled(self.pos_embed, grid)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x.mean(1), x


class MaeEncoder(DinoViT):
    """Fixed positions, zero for [CLS]; those of another grid by bicubic resizing to its size."""

    def __init__(self):
        super().__init__()
        table = sincos(14, WIDTH)
        self.pos_embed = nn.Parameter(
            torch.cat([torch.zeros(1, WIDTH), table]).unsqueeze(0), requires_grad=False
        )

    def resampled(self, positions, grid):
        side = int(positions.shape[1] ** 0.5)
        maps = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        return (
            F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
            .permute(0, 2, 3, 1)
            .flatten(1, 2)
        )


class Mae(MaeEncoder):
    """With the decoder that pre-training needs."""

    def __init__(self, dim=64):
        super().__init__()
        self.decoder_embed = nn.Linear(WIDTH, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(
            torch.cat([torch.zeros(1, dim), sincos(14, dim)]).unsqueeze(0), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList([Block(dim)])
        self.decoder_norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 16 * 16 * 3)


class DropPos(MaeEncoder):
    """A token for dropped positions; the decoder names positions, so it is given none."""

    def __init__(self, dim=64, multi_task=False):
        super().__init__()
        self.mask_pos_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.decoder_embed = nn.Linear(WIDTH, dim)
        self.decoder_blocks = nn.ModuleList([Block(dim)])
        self.decoder_norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 14**2)
        if multi_task:
            self.aux_decoder_embed = nn.Linear(WIDTH, dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.aux_decoder_pred = nn.Linear(dim, 16 * 16 * 3)


class NecoViT(DinoViT):
    """A projection head on the patches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.projection_head = mlp(WIDTH, 64, 32)


class LeopartViT(NecoViT):
    """And prototypes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.prototypes = nn.Linear(32, 10, bias=False)


class NecoOnDinov2(NecoViT):
    """DINOv2's backbone: patches of 14, LayerScale, registers after [CLS] that carry no position."""

    def __init__(self, n_registers=0):
        super().__init__(patch=14, side=9, layerscale="dinov2")
        self.mask_token = nn.Parameter(torch.zeros(1, WIDTH))
        self.n_registers = n_registers
        if n_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, n_registers, WIDTH))

    def forward(self, image):
        x, grid = self.patches_in(image)
        x = x + self.resampled(self.pos_embed[:, 1:], grid)
        first = [self.cls_token + self.pos_embed[:, :1]] + (
            [self.register_tokens] if self.n_registers else []
        )
        x = torch.cat([torch.cat(first, dim=1).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.n_registers :]


class TimeT(nn.Module):
    """A feature extractor with a head, prototypes, and perhaps a moving average of the extractor."""

    def __init__(self, teacher=False):
        super().__init__()
        self.feature_extractor = extractor()
        self.prototypes = nn.Parameter(torch.zeros(10, 32))
        if teacher:
            self.teacher = extractor()
            self.teacher_prototypes = nn.Parameter(torch.zeros(10, 32))


def extractor():
    module = nn.Module()
    module.backbone, module.head = DinoViT(), mlp(WIDTH, 64, 32)
    return module


def mlp(*sizes):
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.GELU())][:-1])


def sincos(side, dim):
    """Position (row, column) -> [sin, cos of column * f, sin, cos of row * f], f_i = 10000^(-4i / dim):
    [side^2, dim]."""
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    rows = [
        np.concatenate(
            [
                np.sin(c * frequencies),
                np.cos(c * frequencies),
                np.sin(r * frequencies),
                np.cos(r * frequencies),
            ]
        )
        for r in range(side)
        for c in range(side)
    ]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def filled(module, seed=0):
    """Random weights everywhere but in what is fixed, none of them near zero in the mean."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("pos_embed") and not parameter.requires_grad:
                continue
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06 + is_norm)
    return module.eval()


class DinoHead(nn.Module):
    """``two``: a second last layer, for clusters (CrIBo, CrOC)."""

    def __init__(self, two=False):
        super().__init__()
        self.mlp = mlp(WIDTH, 64, 64, 32)
        for name in ("last_layer", "last_layer_c") if two else ("last_layer",):
            setattr(self, name, nn.utils.weight_norm(nn.Linear(32, 48, bias=False)))


def wrapped(backbone, **heads):
    """The wrapper of all crops: ``backbone`` and heads."""
    module = nn.Module()
    module.backbone = backbone
    for name, head in heads.items():
        setattr(module, name, head)
    return filled(module)


def full_checkpoint(student, teacher, loss, **entries):
    """What DINO's training loop saves; ``student`` and ``teacher`` are wrappers, the student is inside
    DDP's."""
    ddp = nn.Module()
    ddp.module = student
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": [], "weight_decay": 0.0}])
    for weight in weights[:3]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    args = argparse.Namespace(
        arch="vit_tiny", patch_size=16, lr=5e-4, use_fp16=True, global_crops_scale=(0.4, 1.0), data_path="x"
    )
    return {
        "student": ddp.state_dict(),
        "teacher": teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 8,
        "args": args,
        loss: {"center": torch.zeros(1, 48)},
        "fp16_scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 3,
        },
        **entries,
    }


def saved(folder, content, name="weights.pth"):
    """The file, written as the methods write theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name)
    return folder / name


def image(size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(reference, backbone, size):
    """Largest difference of the features of an image, [CLS] (of a ViT without, the patches' mean) and
    patches."""
    x = image(size)
    cls, patches = reference(x)
    ours = backbone.eval()(x)
    return max((ours.cls - cls).abs().max().item(), (ours.patches - patches).abs().max().item())
