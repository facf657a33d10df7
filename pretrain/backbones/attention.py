"""Multi-head self-attention by torch's SDPA, or xformers' memory-efficient attention."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbones.relative import RelativePositions
from pretrain.backbones.rotary import Rotation, rotate

ATTENTIONS = ("auto", "sdpa", "xformers")
Shapes = Sequence[tuple[int, int]]  # of packed sequences: (how many, how long) for each length
# Where a sequence's tokens are: buckets [N, N] of relative positions, angles of rotary ones, or nothing
Geometry = Tensor | Rotation | None
Geometries = Geometry | Sequence[Geometry]  # of packed sequences one for each length
QKV_BIASES = ("all", "no_key", "none")


def choose_attention(name: str, relative_positions: bool = False) -> str:
    """Resolve the option ``attention`` to a kernel.

    ``auto`` is torch's SDPA, which has the same flash kernels and runs everywhere.

    Raises:
        ValueError: the name is unknown; ``xformers`` cannot run (not installed, no CUDA device, relative
            positions).
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention: {name!r} is none of {ATTENTIONS}")
    if name != "xformers":
        return "sdpa"
    if relative_positions:
        raise ValueError("attention: 'xformers' has no relative positions here; take attention='sdpa'")
    if importlib.util.find_spec("xformers") is None:
        way = "install it for your torch, or take attention='sdpa'"
        raise ValueError(f"attention: 'xformers' is not installed; {way}")
    if not torch.cuda.is_available():
        raise ValueError("attention: 'xformers' needs a CUDA device and there is none; take attention='sdpa'")
    return "xformers"


class NoKeyBias(nn.Linear):
    """The projection to queries, keys and values side by side, where the keys' part of the bias is not added."""

    bias_mask: Tensor  # [3 D]

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)
        mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim)
        self.register_buffer("bias_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., 3 D]."""
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    """Self-attention with one fused qkv projection (keys ``qkv``, ``proj``, as timm's).

    Sequences of several lengths may be packed: all rows, one after the other, as [T, D], and ``shapes`` ((B,
    N), ...) tells which belong together. The projections then run once over all rows, the kernel once for
    each shape.

    With ``relative_positions`` (key ``rpe_k``, :mod:`pretrain.backbones.relative`; SDPA only) or rotary ones
    (:mod:`pretrain.backbones.rotary`) every pass also takes the :meth:`pretrain.backbones.vit.ViT.geometry` of its grid,
    which tells where the tokens are.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        backend: str = "sdpa",
        relative_positions: bool = False,
        qkv_bias: str = "all",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        has_bias = qkv_bias != "none"
        self.qkv = NoKeyBias(dim) if qkv_bias == "no_key" else nn.Linear(dim, 3 * dim, bias=has_bias)
        self.proj = nn.Linear(dim, dim)
        self.rpe_k = RelativePositions(dim // num_heads) if relative_positions else None

    @property
    def added_bias(self) -> Tensor | None:
        """The bias of queries, keys and values as it is added, [3 D]."""
        return self.qkv.bias * self.qkv.bias_mask if isinstance(self.qkv, NoKeyBias) else self.qkv.bias

    def heads(self, x: Tensor, geometry: Geometry = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> query, key, value, each [B, heads, N, D / heads]."""
        return self.split(self.qkv(x), geometry)

    def split(self, qkv: Tensor, geometry: Geometry = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3 D] -> query, key, value, each [B, heads, N, D / heads], the first two turned by rotary positions."""
        parts = qkv.unflatten(2, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        if isinstance(geometry, Rotation):
            q, k = rotate(parts[:, :, :2], geometry).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, parts[:, :, 2].transpose(1, 2)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, shapes: Shapes | None = None, geometry: Geometries = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; packed, with ``shapes``: [T, D] -> [T, D]."""
        qkv = self.qkv(x)
        if shapes is None:
            assert geometry is None or isinstance(geometry, Tensor | Rotation)
            return self.proj(self.attend(qkv, geometry))
        parts = qkv.split([b * n for b, n in shapes])
        of_each: Any = [None] * len(shapes) if geometry is None else geometry
        attended = [
            self.attend(p.unflatten(0, shape), i).flatten(0, 1) for p, shape, i in zip(parts, shapes, of_each)
        ]
        return self.proj(torch.cat(attended))

    def attend(self, qkv: Tensor, geometry: Geometry = None) -> Tensor:
        """[B, N, 3 D] -> the values that each query attends to, heads side by side, [B, N, D]."""
        return self.look_up(*self.split(qkv, geometry), buckets_of(geometry))

    def look_up(self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor | None = None) -> Tensor:
        """The kernel. Query [B, heads, M, D / heads], key and value [B, heads, N, D / heads] -> [B, M, D]."""
        if self.backend == "xformers":
            from xformers.ops import memory_efficient_attention

            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xformers wants [B, N, heads, D / heads]
            return memory_efficient_attention(q, k, v).flatten(2)  # type: ignore[no-any-return]
        mask = self.relative_logits(q, buckets)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def relative_logits(self, q: Tensor, buckets: Tensor | None) -> Tensor | None:
        """What relative positions, if any, add to logits [B, heads, M, N] of queries [B, heads, M, D / heads].

        Raises:
            ValueError: there are some, but no ``buckets`` [M, N]; a sequence's length does not tell its grid.
        """
        if self.rpe_k is None:
            return None
        if buckets is None:
            needed = "its blocks need the buckets of the grid, ViT.geometry(grid)"
            raise ValueError(f"attention: this ViT has relative positions; {needed}")
        return self.rpe_k(q, buckets)  # type: ignore[no-any-return]

    def attention_map(self, x: Tensor, queries: slice = slice(None), geometry: Geometry = None) -> Tensor:
        """The softmax weights of some queries or all, [B, heads, M (query), N (key)]; for analysis.

        Args:
            geometry: of all queries.
        """
        q, k, _ = self.heads(x, geometry)
        buckets = buckets_of(geometry)
        return self.weights(q[:, :, queries], k, None if buckets is None else buckets[queries])

    def weights(self, q: Tensor, k: Tensor, buckets: Tensor | None = None) -> Tensor:
        """Softmax weights of queries [B, heads, M, D / heads] over keys; ``buckets`` [M, N]."""
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        added = self.relative_logits(q, buckets)
        return (logits if added is None else logits + added).softmax(-1)


def without_special(geometry: Geometry, n_special: int) -> Geometry:
    """Of the patches alone; the special tokens stand first."""
    if isinstance(geometry, Rotation):
        return Rotation(*(t[:, n_special:] for t in geometry))
    return None if geometry is None else geometry[n_special:, n_special:]


def buckets_of(geometry: Geometry) -> Tensor | None:
    """[N, N] of relative positions; None of others."""
    return None if isinstance(geometry, Rotation) else geometry
