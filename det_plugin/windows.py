"""Blocks that attend within windows of the patch grid (ViTDet: Li et al., 2022, section 3). An option, not
the default.

Without special tokens a windowed block equals that of Detectron2's ViT (relative positions off). Detectron2
pads the normed map with zeros to whole windows and then projects it, so a patch in a border window also
attends to the projection's bias. Here the map is projected once and padded with that bias. Detectron2's ViT
has no [CLS] and no registers. Here (ours) every window sees them as keys and values, and they see all tokens.
Positions do not change: two patches are as far apart in a window as in the image, and rotary angles are the image's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.backbones.attention import Attention, Geometry
from pretrain.backbones.block import Block
from pretrain.backbones.relative import SPECIAL, relative_buckets
from pretrain.backbones.rotary import Rotation
from pretrain.errors import UserError


class Windows(NamedTuple):
    """A patch grid (h, w), and the side of its windows in patches."""

    grid: tuple[int, int]
    size: int


def global_blocks(depth: int, n_global: int) -> list[int]:
    """Which of ``depth`` blocks have no windows, the last of each of ``n_global`` groups: 2, 5, 8, 11.

    Raises:
        UserError: the groups are not equal.
    """
    if n_global < 1 or depth % n_global:
        raise UserError(f"backbone: global_blocks={n_global} does not part {depth} blocks into equal groups")
    return list(range(depth // n_global - 1, depth, depth // n_global))


def windowed_block(
    block: Block, x: Tensor, paths: Tensor | None, windows: Windows, geometry: Geometry = None
) -> Tensor:
    """``block(x, None, paths)``, its attention within windows.

    Args:
        x: [B, S + h * w, D], S special tokens first.
        paths: [2, B, 1, 1], factors of the two branches, or None, as in
            :class:`pretrain.backbones.block.Block`.
        geometry: where the tokens are in the image.
    """
    drop1, drop2 = (block.drop_path, block.drop_path) if paths is None else (paths[0].mul, paths[1].mul)
    x = x + drop1(block.ls1(windowed_attention(block.attn, block.norm1(x), windows, geometry)))
    return x + drop2(block.ls2(block.mlp(block.norm2(x))))


def windowed_attention(
    attention: Attention, x: Tensor, windows: Windows, geometry: Geometry = None
) -> Tensor:
    """[B, S + h * w, D] -> [B, S + h * w, D], S special tokens first."""
    (height, width), size = windows
    qkv = attention.qkv(x)  # [B, S + h * w, 3 D]
    if isinstance(geometry, Rotation):
        qkv = torch.stack(attention.split(qkv, geometry)).permute(1, 3, 0, 2, 4).flatten(2)
    special, patches = qkv.split([qkv.shape[1] - height * width, height * width], dim=1)
    added = attention.added_bias
    padding = qkv.new_zeros(qkv.shape[2]) if added is None else added.to(qkv.dtype)
    parts = partition(patches.unflatten(1, windows.grid), padding, size)  # [B, n, size^2, 3 D]
    n_parts, n_special = parts.shape[1], special.shape[1]
    if n_special:
        parts = torch.cat([special.unsqueeze(1).expand(-1, n_parts, -1, -1), parts], dim=2)
    near = far = None
    if attention.rpe_k is not None:
        near = relative_buckets((size, size), n_special, x.device)[n_special:]  # [size^2, S + size^2]
        far = near.new_full((n_special, qkv.shape[1]), SPECIAL)  # a special token is as far from all
    q, k, v = attention.split(parts.flatten(0, 1))
    seen = attention.look_up(q[:, :, n_special:], k, v, near).unflatten(0, (-1, n_parts))  # [B, n, size^2, D]
    attended = unpartition(seen, windows).flatten(1, 2)  # [B, h * w, D]
    if n_special:
        q, k, v = attention.split(qkv)
        attended = torch.cat([attention.look_up(q[:, :, :n_special], k, v, far), attended], dim=1)
    return attention.proj(attended)  # type: ignore[no-any-return]


def partition(maps: Tensor, padding: Tensor, size: int) -> Tensor:
    """[B, h, w, C] -> windows [B, n, size * size, C], row-major, padded below and right with [C]."""
    b, height, width, _ = maps.shape
    below, right = -height % size, -width % size
    if right:
        maps = torch.cat([maps, padding.expand(b, height, right, -1)], dim=2)
    if below:
        maps = torch.cat([maps, padding.expand(b, below, width + right, -1)], dim=1)
    tiles = maps.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [B, rows, size, columns, size, C]
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def unpartition(parts: Tensor, windows: Windows) -> Tensor:
    """The inverse: [B, n, size * size, C] -> [B, h, w, C], without the padding."""
    (height, width), size = windows
    rows = -(-height // size)
    tiles = parts.unflatten(2, (size, size)).unflatten(1, (rows, -1))  # [B, rows, columns, size, size, C]
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
