"""Hugging Face's ViTModel, ViTMAEModel, ViTMSNModel, Dinov2Model, Dinov2WithRegistersModel, alone or in a
model with a head.

The names are those of ``save_pretrained`` (``encoder.layer.N.attention.attention.query``, ...) or those that
transformers 5 uses in memory (``layers.N.attention.q_proj``, ...). ``config.json`` beside the file tells what
no tensor does. Without it, LayerNorm's epsilon is 1e-12 for ViT and MAE and 1e-6 for DINOv2, heads have 64
channels, the activation is the exact GELU, pixels are ImageNet's. Positions are resampled bicubically by
size, antialiased with registers (``interpolate_pos_encoding``).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from pretrain.errors import UserError
from pretrain.weights.adapt import with_imagenet_pixels
from pretrain.weights.common import (
    GATED,
    HEAD_DIM,
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    only_network,
    plain_vit,
    without,
)
from pretrain.weights.container import Container

MARK = "embeddings.patch_embeddings.projection.weight"
PREFIXES = ("", "vit.", "dinov2.", "dinov2_with_registers.")  # of the backbone in a model with a head
HEADS = ("pooler.", "classifier.", "decoder.")  # dropped
METHODS = {"vit": "ViT", "vit_mae": "MAE", "vit_msn": "MSN", "dinov2": "DINOv2"}
METHODS["dinov2_with_registers"] = "DINOv2-reg"
GELUS = dict.fromkeys(("gelu", "gelu_python"), "erf")
GELUS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "tanh")
RESCALED = 1 / 255
PARTS = ("query", "key", "value")
RENAMED = (
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"(blocks\.\d+)\.layernorm_before\.(.*)", r"\1.norm1.\2"),
    (r"(blocks\.\d+)\.layernorm_after\.(.*)", r"\1.norm2.\2"),
    (r"(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(.*)", r"\1.attn.\2.\3"),
    *((rf"(blocks\.\d+)\.attention\.{part[0]}_proj\.(.*)", rf"\1.attn.{part}.\2") for part in PARTS),
    (r"(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.(.*)", r"\1.attn.proj.\2"),
    (r"(blocks\.\d+)\.intermediate\.dense\.(.*)", r"\1.mlp.fc1.\2"),
    (r"(blocks\.\d+)\.output\.dense\.(.*)", r"\1.mlp.fc2.\2"),
    (r"(blocks\.\d+)\.layer_scale([12])\.lambda1", r"\1.ls\2.gamma"),
)


def match(file: Container) -> Match:
    """By the name of the patch projection, which only Hugging Face uses."""
    return Match.MARKED if any(prefix + MARK in file.flat for prefix in PREFIXES) else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The backbone of the model, without its heads."""
    only_network(subnet)
    prefix = next((prefix for prefix in PREFIXES if prefix + MARK in file.flat), None)
    if prefix is None:
        raise Misfit(f"no tensor {MARK}")
    named = {key.removeprefix(prefix): value for key, value in file.flat.items()}
    state, config = {_ours(key): value for key, value in without(named, *HEADS).items()}, file.config
    model_type = _model_type(file, state)
    _refuse_others(file, state)
    for block in [key.removesuffix("query.weight") for key in state if key.endswith("attn.query.weight")]:
        _fuse(file, state, block)
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"].flatten(0, -2)  # [1, 1, D] in ViT
    stated = {"depth": config["num_hidden_layers"]} if "num_hidden_layers" in config else {}
    checkpoint = plain_vit(
        file,
        state,
        method=METHODS[model_type],
        **stated,
        num_heads=config.get("num_attention_heads", state["patch_embed.proj.weight"].shape[0] // HEAD_DIM),
        ln_eps=config.get("layer_norm_eps", 1e-6 if model_type.startswith("dinov2") else 1e-12),
        gelu=GELUS[config.get("hidden_act", "gelu")],
        pos_interpolation="bicubic_antialias" if "reg_token" in state else "bicubic",
    )
    _check_config(file, state, checkpoint.model_kwargs)
    return _with_pixels(file, checkpoint)


def _check_config(file: Container, state: State, found: Mapping[str, Any]) -> None:
    """Refuse a config.json of another network than the tensors'."""
    config, kernel = file.config, state["patch_embed.proj.weight"]
    held = {"hidden_size": kernel.shape[0], "num_channels": kernel.shape[1]}
    held["num_hidden_layers"] = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    held["intermediate_size"] = state["blocks.0.mlp.fc1.weight"].shape[0]
    if "pos_grid" in found:
        held["image_size"] = found["pos_grid"] * found["patch_size"]
    if "num_register_tokens" in config:
        held["num_register_tokens"] = found["n_registers"]
    for key, value in held.items():
        told = config.get(key, value)
        if key == "image_size" and type(told) is int:  # a last part of a patch has no position
            told -= told % found["patch_size"]
        if type(told) is not int or told != value:
            said = f"its config.json says {config[key]!r:.60}: take both from one model"
            raise UserError(f"weights: {file.path} has tensors of {key} {value}, {said}")


def _ours(key: str) -> str:
    for pattern, name in RENAMED:
        key = re.sub(f"^{pattern}$", name, key)
    return key


def _model_type(file: Container, state: State) -> str:
    """The type that the config tells, else the tensors."""
    told = file.config.get("model_type")
    if told is None:
        own = "dinov2" if "blocks.0.ls1.gamma" in state else "vit"
        return "dinov2_with_registers" if "reg_token" in state else own
    if not isinstance(told, str) or told not in METHODS:
        raise UserError(f"weights: {file.path} is a network of type {told!r}; read are {', '.join(METHODS)}")
    return told


def _refuse_others(file: Container, state: State) -> None:
    """Refuse networks whose difference no tensor's name shows."""
    config, kernel = file.config, state.get("patch_embed.proj.weight")
    if config.get("use_swiglu_ffn") or any(".mlp.weights_in." in key for key in state):
        raise Misfit(GATED)
    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in GELUS:
        raise UserError(
            f"weights: {file.path} has the activation {activation!r}; ours are {', '.join(GELUS)}"
        )
    stated = config.get("patch_size")
    if "patch_size" in config and kernel is not None and kernel.ndim == 4 and stated != kernel.shape[-1]:
        px = kernel.shape[-1]
        raise UserError(f"weights: {file.path} has patches of {px} px, its config.json says {stated!r}")


def _fuse(file: Container, state: State, attention: str) -> None:
    """Join query, key and value of a block in one projection; missing biases (``qkv_bias: false``) become
    zeros."""
    weights, biases = (
        [state.pop(f"{attention}{part}.{kind}", None) for part in PARTS] for kind in ("weight", "bias")
    )
    if file.config.get("qkv_bias") is False and biases == [None] * 3 and weights[0] is not None:
        biases = [weights[0].new_zeros(weights[0].shape[0])] * 3
    for kind, parts in (("weight", weights), ("bias", biases)):
        found = [part for part in parts if part is not None]
        if absent := [name for name, part in zip(PARTS, parts) if part is None]:
            raise Misfit(f"no tensor {attention}{absent[0]}.{kind}")
        if len({part.shape for part in found}) > 1:
            raise Misfit(f"{attention}query.{kind}, key and value are of several shapes")
        state[f"{attention}qkv.{kind}"] = torch.cat(found)


def _with_pixels(file: Container, checkpoint: Checkpoint) -> Checkpoint:
    """Apply the normalization in preprocessor_config.json."""
    told = file.preprocessor
    if "image_mean" not in told or "image_std" not in told:
        return checkpoint
    factor = told.get("rescale_factor", RESCALED)
    if told.get("do_rescale") is False or not isinstance(factor, float) or abs(factor - RESCALED) > 1e-8:
        raise UserError(f"weights: {file.path}: preprocessor_config.json does not scale pixels to [0, 1]")
    if told.get("do_normalize") is False:
        return with_imagenet_pixels(checkpoint, 0.0, 1.0)
    return with_imagenet_pixels(checkpoint, told["image_mean"], told["image_std"])


SOURCES = (Source("huggingface", "Hugging Face", match, convert),)
