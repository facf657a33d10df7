"""Learning rates and weight decay of the ViT's parameters in fine-tuning, as pure functions of their names.

Names are relative to the ViT, for example ``blocks.3.attn.qkv.weight``. The rule is that of ViTDet
(Detectron2's ``get_vit_lr_decay_rate`` and its overrides), completed for what Detectron2's ViT does not have:
position fields, registers, LayerScale. It deviates twice (ours). Detectron2 gives ``cls_token`` the full
rate, but it enters at layer 0 like the patches. And LayerScale's gamma does not decay, like a norm's weight.
"""

LAYER_ZERO = ("patch_embed", "pos_embed", "pos_field", "cls_pos", "cls_token", "reg_token")
POSITIONS = ("pos_embed", "pos_field", "cls_pos")
FINAL_NORMS = ("norm", "cls_norm", "local_cls_norm")
NORMS = (*FINAL_NORMS, "norm1", "norm2")


def lr_rate(name: str, depth: int, decay: float) -> float:
    """The factor on the learning rate: ``decay ** (depth + 1 - layer)``.

    Layer 0 is what enters the first block, layer i + 1 is block i of ``depth``, and layer depth + 1 the final
    norms.

    Raises:
        ValueError: the ViT has no such parameter.
    """
    first, _, rest = name.partition(".")
    layers = {**dict.fromkeys(LAYER_ZERO, 0), **dict.fromkeys(FINAL_NORMS, depth + 1)}
    if first not in layers and first != "blocks":
        raise ValueError(f"layer decay: {name!r} is no parameter of the ViT")
    layer = int(rest.partition(".")[0]) + 1 if first == "blocks" else layers[first]
    return decay ** (depth + 1 - layer)


def no_decay(name: str) -> bool:
    """Whether weight decay is 0: norms, LayerScale, positions. Other biases decay, as in Detectron2."""
    parts = name.split(".")
    return parts[0] in POSITIONS or parts[-1] == "gamma" or (len(parts) > 1 and parts[-2] in NORMS)
