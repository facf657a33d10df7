"""Multi-head self-attention by torch's SDPA, or xformers' memory-efficient attention."""

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbones.relative import RelativePositions

ATTENTIONS = ("auto", "sdpa", "xformers")
Shapes = Sequence[tuple[int, int]]  # of packed sequences: (how many, how long) for each length
# of relative positions, [N, N]; of packed sequences one for each length
Buckets = Tensor | Sequence[Tensor | None] | None


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


class Attention(nn.Module):
    """Self-attention with one fused qkv projection (keys ``qkv``, ``proj``, as timm's).

    Sequences of several lengths may be packed: all rows, one after the other, as [T, D], and ``shapes`` ((B,
    N), ...) tells which belong together. The projections then run once over all rows, the kernel once for
    each shape.

    With ``relative_positions`` (key ``rpe_k``, :mod:`pretrain.backbones.relative`; SDPA only) every pass also
    takes ``buckets``, the :meth:`pretrain.backbones.vit.ViT.buckets` of its grid, which tell where the tokens
    are.
    """

    def __init__(
        self, dim: int, num_heads: int, backend: str = "sdpa", relative_positions: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rpe_k = RelativePositions(dim // num_heads) if relative_positions else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> query, key, value, each [B, heads, N, D / heads]."""
        return self.split(self.qkv(x))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3 D] -> query, key, value, each [B, heads, N, D / heads]."""
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, shapes: Shapes | None = None, buckets: Buckets = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; packed, with ``shapes``: [T, D] -> [T, D]."""
        qkv = self.qkv(x)
        if shapes is None:
            assert buckets is None or isinstance(buckets, Tensor)
            return self.proj(self.attend(qkv, buckets))
        parts = qkv.split([b * n for b, n in shapes])
        of_each = [None] * len(shapes) if buckets is None else buckets
        attended = [
            self.attend(p.unflatten(0, shape), i).flatten(0, 1) for p, shape, i in zip(parts, shapes, of_each)
        ]
        return self.proj(torch.cat(attended))

    def attend(self, qkv: Tensor, buckets: Tensor | None = None) -> Tensor:
        """[B, N, 3 D] -> the values that each query attends to, heads side by side, [B, N, D]."""
        return self.look_up(*self.split(qkv), buckets)

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
            needed = "its blocks need the buckets of the grid, ViT.buckets(grid)"
            raise ValueError(f"attention: this ViT has relative positions; {needed}")
        return self.rpe_k(q, buckets)  # type: ignore[no-any-return]

    def attention_map(self, x: Tensor, queries: slice = slice(None), buckets: Tensor | None = None) -> Tensor:
        """The softmax weights of some queries or all, [B, heads, M (query), N (key)]; for analysis.

        Args:
            buckets: [N, N], of all queries.
        """
        q, k, _ = self.heads(x)
        return self.weights(q[:, :, queries], k, None if buckets is None else buckets[queries])

    def weights(self, q: Tensor, k: Tensor, buckets: Tensor | None = None) -> Tensor:
        """Softmax weights of queries [B, heads, M, D / heads] over keys; ``buckets`` [M, N]."""
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        added = self.relative_logits(q, buckets)
        return (logits if added is None else logits + added).softmax(-1)
