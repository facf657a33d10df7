"""Time and memory of our ViT in a segmentor against MMSegmentation's own, with the same weights: forward and backward passes."""

import multiprocessing
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmseg.models.backbones import VisionTransformer
from torch import Tensor, nn

from pretrain.backbones.vit import ViT
from pretrain.benchmark.heads import held_mib
from pretrain.benchmark.step import settle
from pretrain.device import choose_device
from pretrain.registry import BACKBONES
from seg_plugin.backbone import PosfieldViT

CROP_PX, BATCH_SIZE = 512, 2
CONTENDERS = ("mmseg", "ours", "ours, checkpointed")
TOLERANCE = 1e-4  # of outputs and input gradients, which are of the order of 1


def measure(
    backbone: str, rounds: int, device: str = "auto", *, crop_px: int = CROP_PX, batch_size: int = BATCH_SIZE, depth: int = 0
) -> dict[str, Any]:
    """Our backbone over MMSegmentation's, float32, without drop path, LayerScale and registers, which that one does not have.

    Time: in one process, in turns; the median of the turns' ratios. Memory: each in a process of its own, the peak above what it
    holds after its imports (on CUDA torch's own account), with weights and gradients.

    Args:
        backbone: registry name; its sizes.
        rounds: counted turns; one more goes before.
        depth: blocks; 0: the name's own.

    Returns:
        ``time_ratio``, ``memory_ratio``, ``memory_ratio_checkpointed``, and the seconds and MiB behind them.

    Raises:
        UserError: no such device.
    """
    where = choose_device(device)
    task = backbone, crop_px, batch_size, depth, str(where)
    memory = {name: _in_a_process(name, *task) for name in CONTENDERS}
    seconds = _seconds(rounds, *task)
    ratio = {name: median(a / b for a, b in zip(seconds[name], seconds["mmseg"])) for name in CONTENDERS}
    return {
        "time_ratio": round(ratio["ours"], 3),
        "time_ratio_checkpointed": round(ratio["ours, checkpointed"], 3),
        "memory_ratio": round(memory["ours"] / memory["mmseg"], 3),
        "memory_ratio_checkpointed": round(memory["ours, checkpointed"] / memory["mmseg"], 3),
        "seconds": {name: round(median(values), 4) for name, values in seconds.items()},
        "peak_mib": {name: round(value, 1) for name, value in memory.items()},
        "backbone": backbone,
        "crop_px": crop_px,
        "batch_size": batch_size,
        "device": str(where),
        "threads": torch.get_num_threads(),
    }


def contender(name: str, backbone: str, crop_px: int, depth: int) -> nn.Module:
    """One of :data:`CONTENDERS`, with the same weights, in training mode: images [B, 3, H, W] -> (map [B, D, h, w],)."""
    torch.manual_seed(0)
    model_kwargs: dict[str, Any] = {"pos_grid": crop_px // 16, **({"depth": depth} if depth else {})}
    if name != "mmseg":
        return PosfieldViT(backbone, checkpointing=name.endswith("checkpointed"), **model_kwargs)
    ours: ViT = BACKBONES.get(backbone)(**model_kwargs)
    return mmseg_vit(ours, crop_px)


def mmseg_vit(ours: ViT, image_px: int) -> VisionTransformer:
    """MMSegmentation's ViT with the weights of ours, which must have one learned position a patch, no registers and no LayerScale.

    The options are those with which the two are the same function; its defaults leave out the patch embedding's bias and the norm.
    """
    size = ours.model_kwargs
    theirs = VisionTransformer(
        img_size=(image_px, image_px),
        patch_size=size["patch_size"],
        embed_dims=size["embed_dim"],
        num_layers=size["depth"],
        num_heads=size["num_heads"],
        mlp_ratio=int(size["mlp_ratio"]),
        norm_cfg={"type": "LN", "eps": size["ln_eps"]},
        patch_bias=True,
        final_norm=True,
    )
    names = {
        "patch_embed.proj": "patch_embed.projection",
        "attn.qkv.": "attn.attn.in_proj_",
        "attn.proj": "attn.attn.out_proj",
        "norm1": "ln1",
        "norm2": "ln2",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
        "blocks": "layers",
    }
    state: dict[str, Tensor] = {}
    for key, value in ours.state_dict().items():
        for our_name, their_name in names.items():
            key = key.replace(our_name, their_name)
        state["ln1" + key.removeprefix("norm") if key.startswith("norm.") else key] = value
    theirs.load_state_dict(state)
    return theirs


def _pass(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward; the map."""
    for parameter in model.parameters():
        parameter.grad = None
    (features,) = model(x)
    features.backward(torch.linspace(-1, 1, features.numel(), device=x.device).view_as(features))
    return features.detach()  # type: ignore[no-any-return]


def _images(crop_px: int, batch_size: int, device: str) -> Tensor:
    return torch.randn(batch_size, 3, crop_px, crop_px, generator=torch.Generator().manual_seed(0)).to(device)


def _seconds(rounds: int, backbone: str, crop_px: int, batch_size: int, depth: int, device: str) -> dict[str, list[float]]:
    """Seconds of every counted turn of each contender, once it is seen that they compute the same."""
    where, x = torch.device(device), _images(crop_px, batch_size, device)
    models = {name: contender(name, backbone, crop_px, depth).to(where) for name in CONTENDERS}
    expected = None
    for name, model in models.items():
        image = x[:1].clone().requires_grad_()
        found = _pass(model, image), image.grad
        expected = expected or found
        for got, wanted in zip(found, expected):
            assert got is not None and wanted is not None
            error = float((got - wanted).abs().max() / wanted.abs().max())
            assert error < TOLERANCE, f"{name} is not the same network: {error}"
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + rounds):
        for name, model in models.items():
            settle(where)
            started = time.perf_counter()
            _pass(model, x)
            settle(where)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _in_a_process(*arguments: Any) -> float:
    """:func:`_peak` in a fresh process: peaks of a process never come down again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (*arguments, torch.get_num_threads()))


def _peak(name: str, backbone: str, crop_px: int, batch_size: int, depth: int, device: str, threads: int) -> float:
    """Peak MiB of two passes above what the process holds after its imports."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    before = _mib(where, "VmRSS")
    model, x = contender(name, backbone, crop_px, depth).to(where), _images(crop_px, batch_size, device)
    for _ in range(2):  # in the second one the gradients are there already
        _pass(model, x)
    return _mib(where, "VmHWM") - before


def _mib(device: torch.device, what: str) -> float:
    """MiB: on CUDA torch's own account, elsewhere the process's. ``what``: VmRSS, held now; VmHWM, held at most.

    Linux says both itself; ``getrusage`` there also counts what the parent held when it started this process.
    """
    if device.type == "cuda":
        found = torch.cuda.memory_allocated(device) if what == "VmRSS" else torch.cuda.max_memory_allocated(device)
        return found / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    line = next((line for line in lines if line.startswith(what)), None)
    return int(line.split()[1]) / 2**10 if line else held_mib(device)
