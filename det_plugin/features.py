"""From pixels to the one map that the feature pyramid reads; both engines call this and nothing else of the ViT."""

from torch import Tensor

from pretrain.backbones.vit import ViT


def detection_features(vit: ViT, x: Tensor, *, final_norm: bool, keep_special_tokens: bool) -> Tensor:
    """The last layer's patch tokens as a map; ``vit.feature_map(x)`` when both options are on.

    Args:
        x: [B, 3, H, W] normalised pixels, any H and W.
        final_norm: apply the ViT's final norm, as in pre-training; Detectron2's ViT has none.
        keep_special_tokens: leave [CLS] and the registers in the sequence, as in pre-training; else the blocks see patches alone,
            as in Detectron2.

    Returns:
        [B, D, ceil(H / p), ceil(W / p)].
    """
    tokens, grid = vit.embed(x)  # [B, 1 + R + N, D]
    first_patch = 1 + vit.n_registers
    if not keep_special_tokens:
        tokens, first_patch = tokens[:, first_patch:], 0
    for block in vit.blocks:
        tokens = block(tokens)
    if final_norm:
        tokens = vit.norm(tokens)
    return tokens[:, first_patch:].transpose(1, 2).unflatten(2, grid)
