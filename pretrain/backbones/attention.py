"""Multi-head self-attention with a selectable kernel: torch's SDPA, or xformers' memory-efficient attention."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTIONS = ("auto", "sdpa", "xformers")


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
    """Self-attention with one fused qkv projection (keys ``qkv``, ``proj``, as timm's)."""

    def __init__(self, dim: int, num_heads: int, backend: str = "sdpa") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> query, key, value, each [B, heads, N, D / heads]."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        b, n, d = x.shape
        q, k, v = self.heads(x)
        if self.backend == "xformers":
            from xformers.ops import memory_efficient_attention

            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xformers wants [B, N, heads, D / heads]
            out = memory_efficient_attention(q, k, v).reshape(b, n, d)
        else:
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        return self.proj(out)

    def attention_map(self, x: Tensor) -> Tensor:
        """The softmax weights themselves, [B, heads, N (query), N (key)]: for pictures, not for training."""
        q, k, _ = self.heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
