"""Our ViT in a segmentor against MMSegmentation's own: the same weights, time and memory of forward and
backward passes."""

import re
from typing import Any

import torch
from mmseg.models.backbones import VisionTransformer
from torch import Tensor, nn

from pretrain.backbones.vit import ViT
from pretrain.benchmark.turns import Work, in_turns, report
from pretrain.device import choose_device
from pretrain.registry import BACKBONES
from seg_plugin.backbone import PosfieldViT

CONTENDERS = ("mmseg", "ours", "ours, checkpointed")
TOLERANCE = 1e-4  # of outputs and input gradients, which are of the order of 1


def measure(
    backbone: str, rounds: int, device: str = "auto", crop_px: int = 512, batch_size: int = 2, depth: int = 0
) -> dict[str, Any]:
    """Our backbone over MMSegmentation's, in float32. Ours has no drop path, LayerScale or registers here,
    like theirs.

    Memory is the peak above what a process holds after its imports (on CUDA torch's own account), with
    weights and gradients.

    Args:
        backbone: registry name; its sizes.
        rounds: counted turns; one more goes before.
        depth: blocks; 0: the name's own.

    Returns:
        ``time_ratio``, ``memory_ratio``, the same with the ending ``_checkpointed``, and the seconds and MiB
        behind them.

    Raises:
        UserError: no such device.
    """
    where = choose_device(device)
    check_alike(backbone, crop_px, depth, where)
    task = backbone, crop_px, batch_size, depth, where
    found = in_turns({name: (work, (name, *task)) for name in CONTENDERS}, str(where), rounds)
    ratios = {"{}_ratio": ("ours", "mmseg"), "{}_ratio_checkpointed": ("ours, checkpointed", "mmseg")}
    asked = {"backbone": backbone, "crop_px": crop_px, "batch_size": batch_size, "device": str(where)}
    return report(found, ratios) | asked


def work(name: str, backbone: str, crop_px: int, batch_size: int, depth: int, device: torch.device) -> Work:
    """One forward and backward pass of a contender."""
    model, image = contender(name, backbone, crop_px, depth).to(device), noise(batch_size, crop_px, device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward_backward(model, image)

    return step


def noise(n: int, px: int, device: torch.device) -> Tensor:
    """The same [n, 3, px, px] for all."""
    return torch.randn(n, 3, px, px, generator=torch.Generator().manual_seed(0)).to(device)


def check_alike(backbone: str, crop_px: int, depth: int, device: torch.device) -> None:
    """Assert that all contenders give the same features and the same gradient by the image, up to
    rounding."""
    expected = None
    for name in CONTENDERS:
        image = noise(1, crop_px, device).requires_grad_()
        features = forward_backward(contender(name, backbone, crop_px, depth).to(device), image)
        assert image.grad is not None
        found = features, image.grad
        expected = expected or found
        for got, wanted in zip(found, expected):
            error = float((got - wanted).abs().max() / wanted.abs().max())
            assert error < TOLERANCE, f"{name} is not the same network: {error}"


def forward_backward(model: nn.Module, x: Tensor) -> Tensor:
    """[B, 3, H, W] -> the model's map [B, D, h, w]."""
    (features,) = model(x)
    features.backward(torch.linspace(-1, 1, features.numel(), device=x.device).view_as(features))
    return features.detach()  # type: ignore[no-any-return]


def contender(name: str, backbone: str, crop_px: int, depth: int) -> nn.Module:
    """One of :data:`CONTENDERS`, with the same weights, in training mode: images [B, 3, H, W] -> (map [B, D,
    h, w],)."""
    torch.manual_seed(0)
    model_kwargs: dict[str, Any] = {"pos_grid": crop_px // 16, **({"depth": depth} if depth else {})}
    if name != "mmseg":
        return PosfieldViT(backbone, checkpointing=name.endswith("checkpointed"), **model_kwargs)
    return mmseg_vit(BACKBONES.get(backbone)(**model_kwargs), crop_px)


def mmseg_vit(ours: ViT, image_px: int) -> VisionTransformer:
    """MMSegmentation's ViT with the weights of ours, which must have one learned position a patch, no
    registers and no LayerScale.

    These options make both the same function. By default theirs has no bias in the patch embedding and no
    final norm.
    """
    size = ours.model_kwargs
    same = {key: size[key] for key in ("patch_size", "num_heads")}
    same |= {
        "embed_dims": size["embed_dim"],
        "num_layers": size["depth"],
        "mlp_ratio": int(size["mlp_ratio"]),
    }
    norm = {"type": "LN", "eps": size["ln_eps"]}
    theirs = VisionTransformer(image_px, norm_cfg=norm, patch_bias=True, final_norm=True, **same)
    names = {r"patch_embed\.proj": "patch_embed.projection", "mlp.fc1": "ffn.layers.0.0", "blocks": "layers"}
    names |= {
        r"attn\.qkv\.": "attn.attn.in_proj_",
        r"attn\.proj": "attn.attn.out_proj",
        "mlp.fc2": "ffn.layers.1",
    }
    names |= {"norm1": "ln1", "norm2": "ln2", r"^norm\.": "ln1."}
    state: dict[str, Tensor] = {}
    for key, value in ours.state_dict().items():
        for our_name, their_name in names.items():
            key = re.sub(our_name, their_name, key)
        state[key] = value
    theirs.load_state_dict(state)
    return theirs
