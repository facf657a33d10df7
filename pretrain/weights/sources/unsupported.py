"""Networks that people may try and that are no plain ViT. They are recognized, so that the error says why."""

import re
from functools import partial
from typing import NamedTuple

from pretrain.errors import UserError
from pretrain.weights.common import Checkpoint, Match, Source
from pretrain.weights.container import Container, is_state

ROPE = "rotary positions (RoPE) in every attention"
RELATIVE = "a bias of relative positions in every attention"
WINDOWS = "windowed attention with relative positions"


class Refusal(NamedTuple):
    """A network that we refuse.

    Attributes:
        name: what ``source=`` takes.
        method: its name in messages.
        marks: alternatives, each a set of patterns that all have to occur among the names of a file's
            tensors; a pattern that begins with ``!`` must not occur.
        reason: what it has and our ViT has not.
    """

    name: str
    method: str
    marks: tuple[tuple[str, ...], ...]
    reason: str


NO_POSITIONS = "!^(.*\\.)?(pos_embed|position_embeddings)$"
REFUSED = (
    Refusal("rope_vit", "timm's ViT with rotary positions", (
        (r"^reg_token$", r"^blocks\.0\.gamma_1$", NO_POSITIONS, "!^cls_token$"),
    ), "other rotary positions than DINOv3's"),
    Refusal("swin", "Swin", (
        (r"layers\.0\.blocks\.0\..*relative_position_bias_table$",),
    ), WINDOWS + " in a pyramid"),
    Refusal("beit", "BEiT or data2vec", (
        (r"relative_position_bias(_table)?[.\w]*$", r"!layers\.0\.blocks\.0"),
        (r"(^|\.)rel_pos_bias\.relative_position_bias_table$",),
    ), RELATIVE),
    Refusal("eva", "EVA or EVA-02", (
        (r"blocks\.0\.attn\.(q_bias|inner_attn_ln\.weight)$", "!relative_position_bias", r"(^|\.)pos_embed$"),
        (r"blocks\.0\.mlp\.(fc1_g|ffn_ln)\.weight$", r"(^|\.)pos_embed$"), (r"(^|\.)rope\.freqs",),
    ), ROPE + ", or gated MLPs"),
    Refusal("clip", "CLIP or SigLIP", (
        (r"(^|\.)visual\.(transformer\.resblocks\.0|trunk\.blocks\.0|layer1\.0)\.",),
        (r"(^|\.)vision_model\.(encoder\.layers\.0|embeddings)\.",),
        (r"^norm_pre\.weight$", r"^blocks\.0\."), (r"^attn_pool\.latent$",),
    ), "a norm before its blocks, other activations or attention pooling"),
    Refusal("sam", "SAM or ViTDet", ((r"\.attn\.rel_pos_h$",),), WINDOWS),
    Refusal("deit_distilled", "distilled DeiT", (
        (r"(^|\.)(dist_token|embeddings\.distillation_token)$",),
    ), "a second [CLS] token"),
    Refusal("convnext", "ConvNeXt", (
        (r"(^|\.)stages\.0\.(blocks\.)?0\.(conv_dw|dwconv)\.",),
        (r"(^|\.)stages\.0\.layers\.0\.(dwconv|depthwise_conv)\.",),
    ), "convolutions and no patches"),
    Refusal("resnet", "ResNet", (
        (r"(^|\.)layer1\.0\.conv1\.weight$", r"!(^|\.)visual\."),
        (r"encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.",),
    ), "convolutions and no patches"),
)  # fmt: skip


def match(refusal: Refusal, file: Container) -> Match:
    """By the names of the tensors; those of a network in a dictionary follow its name."""
    names = ""
    for key, value in file.tree.items():
        start = "" if key in ("model", "state_dict") else f"{key}."
        names += "".join(f"{start}{name}\n" for name in value) if is_state(value) else f"{key}\n"

    def holds(pattern: str) -> bool:
        found = re.search(pattern.removeprefix("!"), names, re.MULTILINE)
        return (found is None) == pattern.startswith("!")

    return Match.MARKED if any(all(map(holds, patterns)) for patterns in refusal.marks) else Match.NONE


def convert(refusal: Refusal, file: Container, subnet: str | None) -> Checkpoint:
    """Raises UserError that says what the network has and ours has not."""
    has = f"{refusal.method}, which has {refusal.reason}"
    raise UserError(f"weights: {file.path} is of {has}: a network that is none of ours")


SOURCES = tuple(Source(r.name, r.method, partial(match, r), partial(convert, r)) for r in REFUSED)
