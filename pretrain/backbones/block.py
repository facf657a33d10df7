"""One block of the Vision Transformer, on ordinary sequences or on packed ones, checkpointed or not."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.backbones.attention import Attention, Geometries, Shapes

GELUS = {"erf": "none", "tanh": "tanh"}
CHECKPOINTINGS = ("none", "full", "selective")

_ATEN = torch.ops.aten
_KEPT = {  # what is most expensive to recompute: matrix products and attention kernels
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


class Mlp(nn.Module):
    """Two linear layers with a GELU between them (keys ``fc1``, ``fc2``)."""

    def __init__(self, dim: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate=GELUS[gelu])
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.act(self.fc1(x)))


class SwiGlu(nn.Module):
    """SiLU of one half of a linear layer gates the other (Shazeer, 2020). Keys are timm's: ``fc1`` holds the gate's rows
    first, ``fc2``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel (key ``gamma`` [D])."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: training drops a sample's branch with probability ``rate``, scales up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * kept / keep


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        layerscale: float | None,
        drop_path: float,
        ln_eps: float,
        gelu: str,
        attention: str,
        relative_positions: bool = False,
        qkv_bias: str = "all",
        swiglu: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=ln_eps)
        self.attn = Attention(dim, num_heads, attention, relative_positions, qkv_bias)
        self.ls1 = nn.Identity() if layerscale is None else LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = SwiGlu(dim, round(dim * mlp_ratio)) if swiglu else Mlp(dim, int(dim * mlp_ratio), gelu)
        self.ls2 = nn.Identity() if layerscale is None else LayerScale(dim, layerscale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        shapes: Shapes | None = None,
        paths: Tensor | None = None,
        geometry: Geometries = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D], or packed rows [T, D] -> [T, D].

        Args:
            shapes: of packed rows, see :class:`pretrain.backbones.attention.Attention`.
            paths: [2, T, 1], factors of the two branches (0: dropped), drawn by the caller; None:
                :class:`DropPath` draws them.
            geometry: where the tokens are, see :meth:`pretrain.backbones.vit.ViT.geometry`.
        """
        drop1, drop2 = (self.drop_path, self.drop_path) if paths is None else (paths[0].mul, paths[1].mul)
        x = x + drop1(self.ls1(self.attn(self.norm1(x), shapes, geometry)))
        return x + drop2(self.ls2(self.mlp(self.norm2(x))))


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(
    block: nn.Module, x: Tensor, shapes: Shapes, paths: Tensor | None, rule: str, geometry: Geometries = None
) -> Tensor:
    """A block on packed rows [T, D]; checkpointed: less memory, the same numbers.

    Args:
        paths, geometry: see :class:`Block`; the caller draws the paths, so nothing is drawn twice.
        rule: ``none`` | ``full``: the backward pass recomputes the whole block | ``selective``: all but
            matrix products and attention.
    """
    assert rule in CHECKPOINTINGS, rule
    if rule == "none" or not torch.is_grad_enabled():
        return block(x, shapes, paths, geometry)  # type: ignore[no-any-return]
    context: dict[str, Any] = {}
    if rule == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    context |= {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(block, x, shapes, paths, geometry, **context)  # type: ignore[no-any-return]
