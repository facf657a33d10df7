"""Multi-head self-attention with a selectable kernel: torch's SDPA, or xformers' memory-efficient attention."""

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTIONS = ("auto", "sdpa", "xformers")
Shapes = Sequence[tuple[int, int]]  # of packed sequences: (how many, how long) for each length


def choose_attention(name: str) -> str:
    """Resolve the option ``attention``.

    ``auto`` is torch's SDPA: it has the same flash kernels and runs everywhere. ``xformers`` is taken at its word.

    Raises:
        ValueError: unknown name, or ``xformers`` where it cannot run (not installed, or no CUDA device).
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention: {name!r} is none of {ATTENTIONS}")
    if name != "xformers":
        return "sdpa"
    if importlib.util.find_spec("xformers") is None:
        raise ValueError("attention: 'xformers' is not installed; install it for your torch, or take attention='sdpa'")
    if not torch.cuda.is_available():
        raise ValueError("attention: 'xformers' needs a CUDA device and there is none; take attention='sdpa'")
    return "xformers"


class Attention(nn.Module):
    """Self-attention with one fused qkv projection (keys ``qkv``, ``proj``, as timm's).

    Sequences of several lengths may be packed: the rows of all, one after the other, as [T, D], and ``shapes`` ((B, N), ...) says
    which belong together. The projections then run once over all rows, the kernel once a shape.
    """

    def __init__(self, dim: int, num_heads: int, backend: str = "sdpa") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> query, key, value, each [B, heads, N, D / heads]."""
        return self.split(self.qkv(x))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3 D] -> query, key, value, each [B, heads, N, D / heads]."""
        b, n, d = qkv.shape
        q, k, v = qkv.reshape(b, n, 3, self.num_heads, d // 3 // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, shapes: Shapes | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; packed, with ``shapes``: [T, D] -> [T, D]."""
        qkv = self.qkv(x)
        if shapes is None:
            return self.proj(self.attend(qkv))
        parts = qkv.split([b * n for b, n in shapes])
        return self.proj(torch.cat([self.attend(p.unflatten(0, shape)).flatten(0, 1) for p, shape in zip(parts, shapes)]))

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, N, 3 D] -> the values that each query attends to, heads side by side, [B, N, D]."""
        return self.look_up(*self.split(qkv))

    def look_up(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel: query [B, heads, M, D / heads], key and value [B, heads, N, D / heads] -> heads side by side, [B, M, D]."""
        if self.backend == "xformers":
            from xformers.ops import memory_efficient_attention

            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xformers wants [B, N, heads, D / heads]
            return memory_efficient_attention(q, k, v).flatten(2)  # type: ignore[no-any-return]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def attention_map(self, x: Tensor, queries: slice = slice(None)) -> Tensor:
        """The softmax weights themselves, of some queries or all, [B, heads, M (query), N (key)]; for analysis."""
        q, k, _ = self.heads(x)
        return (q[:, :, queries] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
