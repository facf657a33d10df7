"""Hugging Face's ViTModel, ViTMAEModel, ViTMSNModel, Dinov2Model, Dinov2WithRegistersModel, alone or in a
model with a head, and DINOv3ViTModel.

The names are those of ``save_pretrained`` (``encoder.layer.N.attention.attention.query``, ...) or those that
transformers 5 uses in memory (``layers.N.attention.q_proj``, ...); DINOv3's ``layer.N`` may follow a ``model.``.
``config.json`` beside the file tells what no tensor does. Without it, LayerNorm's epsilon is 1e-12 for ViT and MAE,
1e-6 for DINOv2 and 1e-5 for DINOv3, heads have 64 channels (the 7B's 128), the activation is the exact GELU, pixels
are ImageNet's. Positions are resampled bicubically by size, antialiased with registers
(``interpolate_pos_encoding``). What DINOv3's config says of shifts, jitter and scales of positions is of a training.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pretrain.errors import UserError
from pretrain.weights.adapt import with_imagenet_pixels
from pretrain.weights.common import (
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    fused,
    only_network,
    plain_vit,
    renamed,
    require,
    without,
)
from pretrain.weights.container import Container
from pretrain.weights.sources.dinov3 import (
    LICENSE,
    PARTS,
    ROTARY,
    SAT_METHOD,
    SAT_PIXELS,
    sees_satellites,
    with_keys_biases,
)

MARK = "embeddings.patch_embeddings.projection.weight"
DINOV3_MARKS = "embeddings.patch_embeddings.weight", ("layer.0.attention.", "model.layer.0.attention.")
PREFIXES = ("", "vit.", "dinov2.", "dinov2_with_registers.")  # of the backbone in a model with a head
HEADS = ("pooler.", "classifier.", "decoder.")  # dropped
METHODS = {"vit": "ViT", "vit_mae": "MAE", "vit_msn": "MSN", "dinov2": "DINOv2"}
METHODS |= {"dinov2_with_registers": "DINOv2-reg", "dinov3_vit": "DINOv3"}
EPS = {"dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
BASE = 100  # of DINOv3's frequencies, ``rope_theta``
GELUS = dict.fromkeys(("gelu", "gelu_python"), "erf")
GELUS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "tanh")
RESCALED = 1 / 255
RENAMED = (
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?(.*)", r"patch_embed.proj.\1"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
    (r"(?:encoder\.layer|layers|(?:model\.)?layer)\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"(blocks\.\d+)\.layernorm_before\.(.*)", r"\1.norm1.\2"),
    (r"(blocks\.\d+)\.layernorm_after\.(.*)", r"\1.norm2.\2"),
    (r"(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(.*)", r"\1.attn.\2.\3"),
    *((rf"(blocks\.\d+)\.attention\.{part[0]}_proj\.(.*)", rf"\1.attn.{part}.\2") for part in PARTS),
    (r"(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.(.*)", r"\1.attn.proj.\2"),
    (r"(blocks\.\d+)\.intermediate\.dense\.(.*)", r"\1.mlp.fc1.\2"),
    (r"(blocks\.\d+)\.output\.dense\.(.*)", r"\1.mlp.fc2.\2"),
    (r"(blocks\.\d+)\.mlp\.weights_in\.(.*)", r"\1.mlp.fc1.\2"),  # the gate first
    (r"(blocks\.\d+)\.mlp\.(?:weights_out|down_proj)\.(.*)", r"\1.mlp.fc2.\2"),
    (r"(blocks\.\d+)\.layer_scale([12])\.lambda1", r"\1.ls\2.gamma"),
)


def match(file: Container) -> Match:
    """By the name of the patch projection, which only Hugging Face uses."""
    return Match.NONE if _prefix(file) is None else Match.MARKED


def _prefix(file: Container) -> str | None:
    """Of the backbone's names; None where there is no backbone."""
    kernel, attention = DINOV3_MARKS
    if kernel in file.flat and any(key.startswith(attention) for key in file.flat):
        return ""
    return next((prefix for prefix in PREFIXES if prefix + MARK in file.flat), None)


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The backbone of the model, without its heads."""
    only_network(subnet)
    prefix = _prefix(file)
    if prefix is None:
        raise Misfit(f"no tensor {MARK}")
    named = renamed(file.flat, lambda key: key.removeprefix(prefix))
    is_gated = any(".mlp.gate_proj." in key or ".mlp.weights_in." in key for key in named)
    state, config = renamed(without(named, *HEADS), _ours), file.config
    model_type = _model_type(file, state)
    is_rotary = model_type == "dinov3_vit"
    _refuse_others(file, state, is_gated, is_rotary)
    state = fused(state, ("gate_proj", "up_proj") if is_gated else ("up_proj",), "fc1")
    state, biases = with_keys_biases(state) if is_rotary else (_with_biases(file, state), {})
    state = fused(state, PARTS, "qkv")
    state = {key: value for key, value in state.items() if value.numel() or key != "reg_token"}  # [1, 0, D]
    if "mask_token" in state and state["mask_token"].ndim > 1:
        state["mask_token"] = state["mask_token"].flatten(0, -2)  # [1, 1, D] in ViT and DINOv3
    stated: dict[str, Any] = {"pos_interpolation": "bicubic_antialias" if "reg_token" in state else "bicubic"}
    stated |= (ROTARY | biases if is_rotary else {}) | {
        "gelu": GELUS.get(config.get("hidden_act", ""), "erf")
    }
    stated["ln_eps"] = config.get("layer_norm_eps", EPS.get(model_type, 1e-12))
    for key, theirs in {"depth": "num_hidden_layers", "num_heads": "num_attention_heads"}.items():
        stated |= {key: config[theirs]} if theirs in config else {}
    checkpoint = plain_vit(file, state, method=METHODS[model_type], **stated)
    _check_config(file, state, checkpoint.model_kwargs)
    return _with_pixels(file, _as_dinov3(file, checkpoint) if is_rotary else checkpoint)


def _check_config(file: Container, state: State, found: Mapping[str, Any]) -> None:
    """Refuse a config.json of another network than the tensors'."""
    config, kernel = file.config, state["patch_embed.proj.weight"]
    held = {"hidden_size": kernel.shape[0], "num_channels": kernel.shape[1]}
    held["num_hidden_layers"] = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    held["intermediate_size"] = state["blocks.0.mlp.fc2.weight"].shape[1]
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
    own = "dinov2" if "blocks.0.ls1.gamma" in state else "vit"
    own = "dinov2_with_registers" if "reg_token" in state else own
    own = "dinov3_vit" if DINOV3_MARKS[0] in file.flat else own
    told = file.config.get("model_type", own)
    if not isinstance(told, str) or told not in METHODS:
        raise UserError(f"weights: {file.path} is a network of type {told!r}; read are {', '.join(METHODS)}")
    if "dinov3_vit" in {told, own} and told != own:
        raise UserError(f"weights: {file.path} has tensors of {own}, its config.json says {told}")
    return told


def _refuse_others(file: Container, state: State, is_gated: bool, is_rotary: bool) -> None:
    """Refuse networks whose difference no tensor's name shows, and a config.json that contradicts the names."""
    config, kernel = file.config, state.get("patch_embed.proj.weight")
    activation = config.get("hidden_act", "silu" if is_gated and is_rotary else "gelu")
    known = ("silu",) if is_gated and is_rotary else tuple(GELUS)
    if not isinstance(activation, str) or activation not in known:
        raise UserError(
            f"weights: {file.path} has the activation {activation!r}; ours are {', '.join(known)}"
        )
    stated = config.get("patch_size")
    if "patch_size" in config and kernel is not None and kernel.ndim == 4 and stated != kernel.shape[-1]:
        px = kernel.shape[-1]
        raise UserError(f"weights: {file.path} has patches of {px} px, its config.json says {stated!r}")
    held = {"use_gated_mlp" if is_rotary else "use_swiglu_ffn": is_gated}
    if is_rotary:
        require(state, ("cls_token", "mask_token", "norm.weight", "norm.bias", "blocks.0.ls1.gamma"))
        require(state, ("reg_token",) if config.get("num_register_tokens", 4) else ())
        held |= {f"{part}_bias": f"blocks.0.attn.{part}.bias" in state for part in PARTS}
        held |= {
            "proj_bias": "blocks.0.attn.proj.bias" in state,
            "mlp_bias": "blocks.0.mlp.fc2.bias" in state,
        }
        rope = config.get("rope_parameters")
        base = config.get("rope_theta", rope.get("rope_theta", BASE) if isinstance(rope, Mapping) else BASE)
        if base != BASE:
            raise UserError(
                f"weights: {file.path} has frequencies of rope_theta {base!r:.60}; ours are of {BASE}"
            )
    for key, is_there in held.items():
        if config.get(key, is_there) != is_there:
            said = f"its config.json says {key} {config[key]!r:.60}"
            what = "gated MLPs (SwiGLU)" if key.startswith("use_") else "such tensors"
            raise UserError(f"weights: {file.path} has {'' if is_there else 'no '}{what}, {said}")


def _with_biases(file: Container, state: State) -> State:
    """Missing biases of queries, keys and values (``qkv_bias: false``) become zeros."""
    if file.config.get("qkv_bias") is not False or any(
        f".attn.{part}.bias" in key for part in PARTS for key in state
    ):
        return state
    weights = {
        key: value for key, value in state.items() if re.search(r"\.attn\.(query|key|value)\.weight$", key)
    }
    return state | {key.replace(".weight", ".bias"): w.new_zeros(w.shape[0]) for key, w in weights.items()}


def _as_dinov3(file: Container, checkpoint: Checkpoint) -> Checkpoint:
    """With its licence, and for ImageNet's pixels if only the name says that it saw SAT-493M's."""
    method = {"method": SAT_METHOD} if sees_satellites(file) else {}
    found = replace(checkpoint, provenance={**checkpoint.provenance, "license": LICENSE, **method})
    is_named = bool(method) and "image_mean" not in file.preprocessor
    return with_imagenet_pixels(found, *SAT_PIXELS) if is_named else found


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
