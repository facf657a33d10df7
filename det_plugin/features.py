"""From pixels to the one map that the feature pyramid reads; both engines call this and nothing else of the ViT."""

from dataclasses import dataclass

from torch import Tensor

from det_plugin.protocol import DetectionProtocol
from pretrain.backbones.vit import ViT


@dataclass(frozen=True)
class FeatureOptions:
    """How a detector runs its ViT.

    Attributes:
        final_norm: apply the ViT's final norm, as in pre-training; Detectron2's ViT has none.
        keep_special_tokens: leave [CLS] and the registers in the sequence, as in pre-training; else the blocks see patches alone,
            as in Detectron2.
        window_size, global_blocks: those of :class:`det_plugin.protocol.DetectionProtocol`.
        freeze: nothing in the ViT learns.
        checkpointing: compute the blocks again in the backward pass; less memory, the same numbers.
        compile: torch.compile of the blocks; faster on a GPU, numbers equal up to rounding.
    """

    final_norm: bool = True
    keep_special_tokens: bool = True
    window_size: int = 0
    global_blocks: int = 4
    freeze: bool = False
    checkpointing: bool = False
    compile: bool = False

    @staticmethod
    def of(protocol: DetectionProtocol, *, checkpointing: bool = False, compile: bool = False) -> "FeatureOptions":
        """What a protocol asks for, and what a run adds."""
        return FeatureOptions(
            final_norm=protocol.final_norm,
            keep_special_tokens=protocol.keep_special_tokens,
            window_size=protocol.window_size,
            global_blocks=protocol.global_blocks,
            freeze=protocol.freeze_backbone,
            checkpointing=checkpointing,
            compile=compile,
        )


def prepare(vit: ViT, options: FeatureOptions) -> None:
    """Freeze what gets no gradient: a parameter without one would stop DistributedDataParallel."""
    unused = [] if options.final_norm else ["norm"]
    if not options.keep_special_tokens:
        unused += ["cls_token", "reg_token", "cls_pos"]
    for name, parameter in vit.named_parameters():
        if options.freeze or name.split(".")[0] in unused:
            parameter.requires_grad_(False)


def detection_features(vit: ViT, x: Tensor, options: FeatureOptions) -> Tensor:
    """The last layer's patch tokens as a map; ``vit.feature_map(x)`` with the default options.

    Args:
        x: [B, 3, H, W] normalised pixels, any H and W.

    Returns:
        [B, D, ceil(H / p), ceil(W / p)].
    """
    tokens, grid = vit.embed(x)  # [B, 1 + R + N, D]
    first_patch = 1 + vit.n_registers
    if not options.keep_special_tokens:
        tokens, first_patch = tokens[:, first_patch:], 0
    for block in vit.blocks:
        tokens = block(tokens)
    if options.final_norm:
        tokens = vit.norm(tokens)
    return tokens[:, first_patch:].transpose(1, 2).unflatten(2, grid)
