"""Our ViT in a detector against Detectron2's own: the same weights, one image, forward and backward."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm.layers  # noqa: F401  Detectron2's blocks import it when they are built; here its memory counts for none
import torch
from detectron2.modeling.backbone.vit import ViT as TheirViT
from torch import Tensor, nn

from det_plugin.features import FeatureOptions, detection_features, prepare
from det_plugin.windows import global_blocks
from pretrain.backbones.vit import ViT
from pretrain.benchmark.turns import Work, in_turns, report
from pretrain.build import build_backbone
from pretrain.device import choose_device

WINDOW, GLOBAL_BLOCKS = 14, 4  # ViTDet's
CHECK_PX = 240  # 15 patches a side: two windows, one of them cut
# Detectron2's ViT has no [CLS] in the sequence and no final norm.
ALIKE = partial(FeatureOptions, final_norm=False, keep_special_tokens=False)
OURS = {
    "ours": ALIKE(),
    "ours_checkpointed": ALIKE(checkpointing=True),
    "ours_windowed": ALIKE(window_size=WINDOW),
}
THEIRS = {"detectron2": 0, "detectron2_windowed": WINDOW}


def measure(backbone: str, rounds: int, device: str = "auto", image_px: int = 1024) -> dict[str, Any]:
    """Time and peak memory of a forward and backward pass with one image, ours over Detectron2's.

    Args:
        backbone: registry name.
        rounds: counted turns of each.
        image_px: side of the square image.

    Returns:
        ``time_ratio``, ``memory_ratio``, the same with the endings ``_checkpointed`` (only ours checkpoints)
        and ``_windowed`` (both have windows), and the raw figures of each contender.

    Raises:
        UserError: Detectron2 is absent.
    """
    where = str(choose_device(device))
    check_alike(backbone, where)
    contenders = {name: (work, (name, backbone, image_px, where)) for name in (*THEIRS, *OURS)}
    ratios = {"{}_ratio" + name.removeprefix("ours"): (name, reference(name)) for name in OURS}
    asked = {"backbone": backbone, "image_px": image_px, "device": where}
    return report(in_turns(contenders, where, rounds), ratios) | asked


def reference(name: str) -> str:
    """Which of :data:`THEIRS` one of :data:`OURS` is compared with."""
    return "detectron2_windowed" if name == "ours_windowed" else "detectron2"


def work(name: str, backbone: str, image_px: int, device: str) -> Work:
    """One forward and backward pass of a contender."""
    network = our_network(backbone) if name in OURS else their_network(backbone, THEIRS[name], image_px)
    if isinstance(network, ViT):
        prepare(network, OURS[name])
    network.to(device).train()
    image = torch.randn(1, 3, image_px, image_px, generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        features = features_of(name, network, image)
        features.backward(torch.ones_like(features))

    return step


def features_of(name: str, network: nn.Module, image: Tensor) -> Tensor:
    """[B, D, H / 16, W / 16]."""
    if name in OURS:
        assert isinstance(network, ViT)
        return detection_features(network, image, OURS[name])
    return network(image)["last_feat"]  # type: ignore[no-any-return]


def our_network(backbone: str, **model_kwargs: Any) -> ViT:
    """Random weights, the same in every process. Positions are resampled as in Detectron2."""
    torch.manual_seed(0)
    return build_backbone(backbone, pos_encoding="standard", pos_interpolation="bicubic", **model_kwargs)


def their_network(
    backbone: str,
    window: int,
    image_px: int,
    *,
    relative_positions: bool = False,
    drop_path: float = 0.0,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Detectron2's ViT with all weights of :func:`our_network` that it has.

    Args:
        window: side of a window in patches; 0: every block sees the whole image.
        model_kwargs: of :func:`our_network`.
    """
    ours = our_network(backbone, **(model_kwargs or {}))
    size, depth = ours.model_kwargs, ours.model_kwargs["depth"]
    everywhere = global_blocks(depth, GLOBAL_BLOCKS) if window else range(depth)
    theirs: nn.Module = TheirViT(
        img_size=image_px,
        embed_dim=size["embed_dim"],
        depth=depth,
        num_heads=size["num_heads"],
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=size["ln_eps"]),
        use_rel_pos=relative_positions,
        window_size=window,
        window_block_indexes=[i for i in range(depth) if i not in everywhere],
    )
    missing, left_over = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert all("rel_pos" in key for key in missing)
    assert set(left_over) == {"cls_token", "norm.weight", "norm.bias"}
    return theirs


def check_alike(backbone: str, device: str = "cpu") -> None:
    """Assert that each of ours gives Detectron2's features and gradient by the image, up to rounding."""
    results = {}
    for name in (*THEIRS, *OURS):
        network = our_network(backbone) if name in OURS else their_network(backbone, THEIRS[name], CHECK_PX)
        noise = torch.randn(1, 3, CHECK_PX, CHECK_PX, generator=torch.Generator().manual_seed(2))
        image = noise.to(device).requires_grad_()
        features = features_of(name, network.to(device), image)
        (features * features.detach().cos()).sum().backward()
        assert image.grad is not None
        results[name] = features.detach(), image.grad
    for name in OURS:
        for ours, theirs in zip(results[name], results[reference(name)]):
            assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max(), name
