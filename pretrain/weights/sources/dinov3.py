"""DINOv3 (Simeoni et al., 2025), its own files: the published backbones, and the checkpoints of its training.

Published: flat, ``dinov3_vits16_pretrain_lvd1689m-HASH.pth`` and alike. Beside DINOv2's names there are ``storage_tokens``
[1, R, D] (registers), ``rope_embed.periods`` [d / 4] of a head of width d, ``mlp.w1`` (the gate), ``w2`` and ``w3`` of gated
MLPs, ``local_cls_norm`` (7B; ViT-L of SAT-493M), and ``attn.qkv.bias_mask`` [3 D], by which the bias is multiplied: 1, and 0
for the keys (``init_weights_vit``), or 0 everywhere, as the published files have it (facebookresearch/dinov3, issue 195).
The 7B has no such bias. Periods are rounded to bfloat16; ours are not, as those of transformers and timm.

Training: ``{teacher: {backbone.*, dino_head.*, ibot_head.*}}`` of an evaluation (``do_test``), or ``{model: {student.*,
teacher.*}}``, as torch makes it of a distributed checkpoint. What no tensor tells is that of the published networks:
LayerNorm's epsilon is 1e-5.

SAT-493M's pixels have statistics of their own, told by the file's name (``sat493m``), else by ``local_cls_norm`` of a ViT-L.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pretrain.backbones.rotary import frequencies
from pretrain.weights.adapt import with_imagenet_pixels
from pretrain.weights.common import (
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    fused,
    is_named,
    plain_vit,
    renamed,
    replacing,
    require,
    without,
)
from pretrain.weights.container import Container
from pretrain.weights.sources.dinov2 import chosen, trained

LICENSE = "DINOv3 License"  # of the published weights
SAT_METHOD = "DINOv3-SAT"
SAT_PIXELS = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # mean and deviation of red, green, blue
ROTARY: dict[str, Any] = {"pos_encoding": "rotary", "pos_interpolation": "none", "ln_eps": 1e-5}
NEEDED = ("cls_token", "mask_token", "norm.weight", "norm.bias", "blocks.0.ls1.gamma")
PERIODS = "rope_embed.periods"
PARTS = ("query", "key", "value")  # names of ours for what others hold apart
ROUNDING = 2**-8  # of bfloat16, relative
RENAMED = {"storage_tokens": "reg_token", ".mlp.w3.": ".mlp.fc2."}


def match(sat: bool, file: Container) -> Match:
    """By its periods or storage tokens, and whose pixels they saw."""
    states = list(trained(file).values()) or [file.flat]
    if not any(key.endswith((PERIODS, "storage_tokens")) for state in states for key in state):
        return Match.NONE
    return Match.MARKED if _is_sat(file) == sat else Match.NONE


def convert(sat: bool, file: Container, subnet: str | None) -> Checkpoint:
    """The published backbone, or the teacher's (default) or student's of a training, for ImageNet's pixels."""
    name, state = chosen(file, subnet, trained(file))
    state = renamed(state, replacing(RENAMED))
    require(state, NEEDED if name else (*NEEDED, "reg_token"))  # a training may have had none
    state, head_dim = _without_periods(state)
    state, bias = _without_masks(state)
    found = plain_vit(file, fused(state, ("w1", "w2"), "fc1"), name, **ROTARY, qkv_bias=bias)
    width = found.model_kwargs["embed_dim"]
    if width % head_dim:
        raise Misfit(f"{PERIODS} are those of heads of {head_dim} channels, but there are {width}")
    model_kwargs = {**found.model_kwargs, "num_heads": width // head_dim}
    checkpoint = replace(
        found, model_kwargs=model_kwargs, provenance={**found.provenance, "license": LICENSE}
    )
    if sat:
        return with_imagenet_pixels(checkpoint, *SAT_PIXELS)
    if not name and "local_cls_norm.weight" in state and not is_named(file, "lvd1689m"):
        told = "its name does not say lvd1689m or sat493m; read with ImageNet's pixels"
        warnings.warn(f"weights: {file.path}: {told}; for SAT-493M's give source=dinov3_sat", stacklevel=2)
    return checkpoint


def sees_satellites(file: Container) -> bool:
    """Whether the statistics of pixels beside a file, or its name, are SAT-493M's."""
    told = file.preprocessor.get("image_mean")
    return is_named(file, "sat493m") if told is None else told == list(SAT_PIXELS[0])


def with_keys_biases(state: State) -> tuple[State, dict[str, Any]]:
    """Keys have no bias where queries and values have one: zeros, and ``qkv_bias``, which says that they do not count."""
    held = [part for part in PARTS if f"blocks.0.attn.{part}.bias" in state]
    if held != ["query", "value"]:
        return state, {"qkv_bias": "all" if held else "none"}
    queries = {key: value for key, value in state.items() if key.endswith(".attn.query.bias")}
    keys = {key.replace(".query.", ".key."): torch.zeros_like(value) for key, value in queries.items()}
    if unmasked := keys.keys() & state.keys():
        raise Misfit(f"left over {min(unmasked)}")
    return state | keys, {"qkv_bias": "no_key"}


def _is_sat(file: Container) -> bool:
    if is_named(file, "sat493m|lvd1689m"):
        return is_named(file, "sat493m")
    norm = file.flat.get("local_cls_norm.weight")
    return norm is not None and tuple(norm.shape) == (1024,)


def _without_periods(state: State) -> tuple[State, int]:
    """The rest, and the width of a head that they tell.

    Raises:
        Misfit: they are missing, or not those that ours has.
    """
    require(state, (PERIODS,))
    periods = state[PERIODS]
    if periods.ndim != 1 or not periods.is_floating_point() or not len(periods):
        raise Misfit(
            f"{PERIODS} is {tuple(periods.shape)} of {periods.dtype}, not one number for each frequency"
        )
    head_dim = 4 * len(periods)
    wanted = 1 / frequencies(head_dim, dtype=torch.float64)
    if not bool(((periods.double() - wanted).abs() <= ROUNDING * wanted).all()):
        told = f"from {periods[0].item():.5g} to {periods[-1].item():.5g}"
        ours = f"ours are 100^(4i / {head_dim}), from 1 to {wanted[-1].item():.5g}"
        raise Misfit(f"{PERIODS} are others, {told}; {ours}")
    return without(state, PERIODS), head_dim


def _without_masks(state: State) -> tuple[State, str]:
    """With the biases as they count, and ``qkv_bias`` of the network.

    Raises:
        Misfit: names a mask that is missing, or of other values.
    """
    biases = [key for key in state if key.endswith(".attn.qkv.bias")]
    masks = [key for key in state if key.endswith(".attn.qkv.bias_mask")]
    require(state, [key.removesuffix("_mask") for key in masks])
    if not masks:
        return state, "all" if biases else "none"
    require(state, [f"{key}_mask" for key in biases])
    rest = {key: value for key, value in state.items() if key not in masks}
    for key in biases:
        bias, mask = state[key], state[f"{key}_mask"]
        if mask.shape != bias.shape or mask.ndim != 1 or len(mask) % 3:
            raise Misfit(f"{key}_mask is {tuple(mask.shape)}, the bias {tuple(bias.shape)}")
        queries, keys, values = mask.chunk(3)
        if keys.any() or {*queries.tolist(), *values.tolist()} not in ({0.0}, {1.0}):
            raise Misfit(f"{key}_mask is neither 0 nor 0 for the keys and 1 for the rest")
        rest[key] = bias * mask
    return rest, "no_key"


SOURCES = (
    Source("dinov3", "DINOv3", partial(match, False), partial(convert, False)),
    Source("dinov3_sat", SAT_METHOD, partial(match, True), partial(convert, True)),
)
