"""From pixels to the map that the feature pyramid reads. Both engines call this and nothing else of the
ViT."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from det_plugin.protocol import DetectionProtocol
from det_plugin.windows import Windows, global_blocks, windowed_block
from pretrain.backbones.attention import Geometry, without_special
from pretrain.backbones.block import Block
from pretrain.backbones.vit import ViT

COMPILER = "inductor"  # torch.compile's backend


@dataclass(frozen=True)
class FeatureOptions:
    """How a detector runs its ViT.

    Attributes:
        final_norm: apply the ViT's final norm, as in pre-training; Detectron2's ViT has none.
        keep_special_tokens: keep [CLS] and the registers in the sequence, as in pre-training. Without, the
            blocks only see patches, as in Detectron2.
        window_size, global_blocks: as in :class:`det_plugin.protocol.DetectionProtocol`.
        freeze: the ViT does not learn. It runs as in evaluation (no drop path) and keeps nothing for a
            backward pass.
        checkpointing: recompute the blocks in the backward pass. Less memory, the same numbers.
        compile: torch.compile the blocks. Faster on a GPU; numbers are equal up to rounding.
    """

    final_norm: bool = True
    keep_special_tokens: bool = True
    window_size: int = 0
    global_blocks: int = 4
    freeze: bool = False
    checkpointing: bool = False
    compile: bool = False

    @staticmethod
    def of(protocol: DetectionProtocol, checkpointing: bool, compile: bool) -> "FeatureOptions":
        """The options of a protocol, with those that a run adds."""
        windows = protocol.window_size, protocol.global_blocks
        own = protocol.final_norm, protocol.keep_special_tokens, *windows, protocol.freeze_backbone
        return FeatureOptions(*own, checkpointing, compile)


def prepare(vit: ViT, options: FeatureOptions) -> None:
    """Freeze the parameters that get no gradient: they would stop DistributedDataParallel.

    Raises:
        UserError: there are windows, and ``global_blocks`` does not divide the depth.
    """
    if options.window_size:
        global_blocks(len(vit.blocks), options.global_blocks)
    unused = ["mask_token", "pos_mask_token"]
    if not options.final_norm:
        unused += ["norm"]
    if not options.keep_special_tokens:
        unused += ["cls_token", "reg_token", "cls_pos"]
    for name, parameter in vit.named_parameters():
        if options.freeze or name.split(".")[0] in unused:
            parameter.requires_grad_(False)


def detection_features(vit: ViT, x: Tensor, options: FeatureOptions) -> Tensor:
    """The last layer's patch tokens as a map; ``vit.feature_map(x)`` with the default options.

    Args:
        x: [B, 3, H, W] normalized pixels, any H and W.

    Returns:
        [B, D, ceil(H / p), ceil(W / p)].
    """
    if options.freeze:
        vit.eval()  # each time, for the detector's train() reaches the ViT too
    with torch.set_grad_enabled(torch.is_grad_enabled() and not options.freeze):
        tokens, grid = vit.embed(x)  # [B, S + N, D]
        geometry = vit.geometry(grid)
        if not options.keep_special_tokens:
            tokens = tokens[:, vit.n_prefix :]
            geometry = without_special(geometry, vit.n_prefix)
        tokens = _run_blocks(vit, tokens, grid, geometry, options)
        if options.final_norm:
            tokens = vit.norm(tokens)
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def _run_blocks(
    vit: ViT, tokens: Tensor, grid: tuple[int, int], geometry: Geometry, options: FeatureOptions
) -> Tensor:
    """[B, S + N, D] -> [B, S + N, D], S special tokens first."""
    n_global = options.global_blocks if options.window_size else len(vit.blocks)
    everywhere = global_blocks(len(vit.blocks), n_global)
    # Drawn here, not in the blocks: a block that is computed again drops the same paths, and a compiled one
    # draws nothing.
    paths = vit.draw_paths([(len(tokens), 1)], tokens.device)  # [depth, 2, B, 1]
    run = _compiled(COMPILER) if options.compile else run_block
    for i, block in enumerate(vit.blocks):
        windows = None if i in everywhere else Windows(grid, options.window_size)
        own = None if paths is None else paths[i].unsqueeze(-1)
        arguments: Any = block, tokens, own, windows, geometry
        if options.checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens = run(*arguments)
    return tokens


def run_block(
    block: Block, x: Tensor, paths: Tensor | None, windows: Windows | None, geometry: Geometry = None
) -> Tensor:
    """[B, S + N, D] -> [B, S + N, D]. Without ``windows`` each token sees all others."""
    if windows is None:
        return block(x, None, paths, geometry)  # type: ignore[no-any-return]
    return windowed_block(block, x, paths, windows, geometry)


@cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    """:func:`run_block`, compiled once for all blocks. The modules and their keys do not change."""
    return torch.compile(run_block, backend=backend)
