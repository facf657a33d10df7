"""Export to Hugging Face's transformers: ``config.json``, ``model.safetensors`` and
``preprocessor_config.json``.

The class is ``ViTModel`` without LayerScale and registers, ``Dinov2Model`` with LayerScale or gated MLPs,
``Dinov2WithRegistersModel`` with registers, ``DINOv3ViTModel`` with rotary positions. Every version of transformers
reads the names on disk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.rotary import BASE
from pretrain.backbones.vit import ViT
from pretrain.export.fixed_size import (
    Outputs,
    Run,
    Size,
    Usage,
    description,
    outputs_of,
    plain_state,
    refuse,
    renamed,
    require,
    whole_patches,
    write_folder,
)
from pretrain.views.pixels import MEAN, STD

ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}
BICUBIC = 3  # Pillow's number
TYPES = {"ViTModel": "vit", "Dinov2Model": "dinov2", "Dinov2WithRegistersModel": "dinov2_with_registers"}
TYPES["DINOv3ViTModel"] = "dinov3_vit"
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
ATTENTION = {f"attn.{part}": f"attention.attention.{part}." for part in ("query", "key", "value")}
ATTENTION |= {"attn.proj": "attention.output.dense."}
IN_VIT = {**ATTENTION, "norm1": "layernorm_before.", "norm2": "layernorm_after."}
IN_VIT |= {"mlp.fc1": "intermediate.dense.", "mlp.fc2": "output.dense."}
IN_DINOV2 = {**ATTENTION, "ls1": "layer_scale1.", "ls2": "layer_scale2."}
IN_DINOV2 |= {name: f"{name}." for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}


IN_DINOV2 |= {"mlp.w12": "mlp.weights_in.", "mlp.w3": "mlp.weights_out."}
OUTSIDE_DINOV3 = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
}
IN_DINOV3 = {f"attn.{letter}": f"attention.{letter}_proj." for letter in ("q", "k", "v")}
IN_DINOV3 |= {"attn.proj": "attention.o_proj.", "norm1": "norm1.", "norm2": "norm2."}
IN_DINOV3 |= {"mlp.gate": "mlp.gate_proj.", "mlp.fc1": "mlp.up_proj.", "mlp.fc2": "mlp.down_proj."}
IN_DINOV3 |= {"ls1": "layer_scale1.", "ls2": "layer_scale2."}


def model_class(vit: ViT) -> str:
    """The class of transformers that computes this network."""
    if vit.pos_encoding == "rotary":
        return "DINOv3ViTModel"
    if vit.n_registers:
        return "Dinov2WithRegistersModel"
    return "ViTModel" if vit.model_kwargs["layerscale"] is None and not vit.is_gated else "Dinov2Model"


def huggingface_state(vit: ViT, size: Size) -> dict[str, Tensor]:
    """The tensors under the names on disk. What the class has and this network lacks gets values that change
    nothing."""
    if vit.pos_encoding == "rotary":
        return _dinov3_state(vit, size)
    is_vit = model_class(vit) == "ViTModel"
    inside, state = IN_VIT if is_vit else IN_DINOV2, dict[str, Tensor]()
    for key, value in plain_state(vit, size).items():
        parts = {key: value}
        if ".attn.qkv." in key:
            names = [key.replace("qkv", name) for name in ("query", "key", "value")]
            parts = {name: part.clone() for name, part in zip(names, value.chunk(3))}
        elif vit.is_gated and ".mlp." in key:
            parts = {key.replace("fc1", "w12").replace("fc2", "w3"): value}
        state |= {renamed(name, OUTSIDE, "encoder.layer.", inside): part for name, part in parts.items()}
    state = {key.replace(".gamma", ".lambda1"): value for key, value in state.items()}
    width = vit.embed_dim
    if is_vit:  # the pooler is the identity
        return {**state, "pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    mask_token = vit.mask_token.detach().clone() if vit.model_kwargs["mask_tokens"] else torch.zeros(1, width)
    if vit.model_kwargs["layerscale"] is None:
        scales = (f"encoder.layer.{i}.layer_scale{n}" for i in range(len(vit.blocks)) for n in (1, 2))
        state |= {f"{name}.lambda1": torch.ones(width) for name in scales}
    return {**state, "embeddings.mask_token": mask_token}


def _dinov3_state(vit: ViT, size: Size) -> dict[str, Tensor]:
    own, state, width = vit.model_kwargs, dict[str, Tensor](), vit.embed_dim
    for key, value in plain_state(vit, size).items():
        parts = {key: value}
        if ".attn.qkv." in key:
            parts = {key.replace("qkv", letter): part.clone() for letter, part in zip("qkv", value.chunk(3))}
            absent = {"no_key": "k", "none": "qkv"}.get(vit.qkv_bias, "")
            parts = {
                name: part for name, part in parts.items() if not (name[-4:] == "bias" and name[-6] in absent)
            }
        elif vit.is_gated and ".fc1." in key:
            gate, up = value.chunk(2)
            parts = {key.replace("fc1", "gate"): gate.clone(), key: up.clone()}
        state |= {renamed(name, OUTSIDE_DINOV3, "layer.", IN_DINOV3): part for name, part in parts.items()}
    state = {key.replace(".gamma", ".lambda1"): value for key, value in state.items()}
    if own["layerscale"] is None:
        scales = (f"layer.{i}.layer_scale{n}.lambda1" for i in range(len(vit.blocks)) for n in (1, 2))
        state |= {name: torch.ones(width) for name in scales}
    if not vit.n_registers:
        state["embeddings.register_tokens"] = torch.empty(1, 0, width)
    token = vit.mask_token.detach().clone() if own["mask_tokens"] else torch.zeros(1, width)
    return {**state, "embeddings.mask_token": token.unsqueeze(0)}


def export_huggingface(vit: ViT, size: Size, path: Path, provenance: Mapping[str, Any]) -> Run:
    """A folder that ``transformers.AutoModel.from_pretrained`` loads without a tensor missing or left over.

    Raises:
        UserError: transformers is not installed; names what its classes cannot express.
        RuntimeError: transformers reports a tensor as missing or left over.
    """
    require("huggingface", "transformers")
    own = vit.model_kwargs
    departures = {"without [CLS]": not vit.has_cls, "without a final norm": not own["final_norm"]}
    refuse("transformers", vit, departures)
    name = model_class(vit)
    is_dinov2 = name.startswith("Dinov2")
    told = f"the grid of positions of transformers' {name} is square; give one side"
    grid = whole_patches(vit, size, told if is_dinov2 else "")
    if is_dinov2:
        departures = {f"with mlp_ratio {own['mlp_ratio']:g}": _dinov2_ratio(vit) is None}
        refuse(f"transformers ({name})", vit, departures)
    state, told = huggingface_state(vit, size), description(vit, size, provenance)
    write_folder(path, state, told, config=_config(vit, size), preprocessor_config=_preprocessor(size))
    model = _load(path)

    @torch.no_grad()
    def run(image: Tensor) -> Outputs:
        found = model(image)
        return outputs_of(vit.split(found.last_hidden_state), grid, found.pooler_output)

    return run


def use_huggingface(vit: ViT, size: Size, path: str) -> Usage:
    """How to use it."""
    code = f"""from transformers import AutoModel

model = AutoModel.from_pretrained({path!r}).eval()
outputs = model(pixel_values=image)
cls = outputs.pooler_output  # [B, D]
patches = outputs.last_hidden_state[:, {vit.n_prefix}:]  # [B, N, D]"""
    name = model_class(vit)
    notes = [f"The class is `{name}`. `AutoImageProcessor.from_pretrained({path!r})` resizes and normalizes."]
    if name == "ViTModel":
        notes += [
            'The pooler is the identity (`pooler_act` "linear"): its output is [CLS] after the final norm.',
            "At other sizes: `model(pixel_values=image, interpolate_pos_encoding=True)`, from a square grid only.",
        ]
    elif vit.model_kwargs["layerscale"] is None:
        notes.append("The network has no LayerScale; the class's is filled with ones.")
    if name != "ViTModel" and not vit.model_kwargs["mask_tokens"]:
        notes.append("`mask_token` is zeros: the class holds one, the weights did not.")
    return Usage("transformers", code, tuple(notes))


def _config(vit: ViT, size: Size) -> dict[str, Any]:
    """``config.json``: what differs from the class's defaults, or from those of older versions."""
    model_kwargs, name = vit.model_kwargs, model_class(vit)
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": TYPES[name],
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": model_kwargs["depth"],
        "num_attention_heads": model_kwargs["num_heads"],
        "hidden_act": ACTIVATIONS[model_kwargs["gelu"]],
        "layer_norm_eps": model_kwargs["ln_eps"],
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": vit.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "dtype": "float32",
    }
    if name == "ViTModel":
        config["intermediate_size"] = hidden_width(vit)
        return {**config, "pooler_act": "linear", "pooler_output_size": vit.embed_dim}
    if name == "DINOv3ViTModel":
        own = dict[str, Any](pos_embed_rescale=None, rope_theta=BASE)
        own |= {f"{part}_bias": vit.qkv_bias != "none" for part in ("query", "value")}
        own |= {"key_bias": vit.qkv_bias == "all", "use_gated_mlp": vit.is_gated, "layerscale_value": 1.0}
        own |= {"num_register_tokens": vit.n_registers, "intermediate_size": hidden_width(vit)}
        own |= {"hidden_act": "silu"} if vit.is_gated else {}
        del config["qkv_bias"]
        return {**config, **own}
    config |= {"mlp_ratio": _dinov2_ratio(vit), "use_swiglu_ffn": vit.is_gated}
    config["layerscale_value"] = model_kwargs["layerscale"] or 1.0
    return {**config, "num_register_tokens": vit.n_registers} if vit.n_registers else config


def hidden_width(vit: ViT) -> int:
    """Of the MLPs."""
    return int(vit.state_dict()["blocks.0.mlp.fc2.weight"].shape[1])


def _dinov2_ratio(vit: ViT) -> int | None:
    """The whole number from which Dinov2Model makes the hidden width, of gated MLPs 2/3 of it and up to a multiple of 8;
    None: there is none."""
    hidden = hidden_width(vit)

    def made(ratio: int) -> int:
        plain = vit.embed_dim * ratio
        return (int(plain * 2 / 3) + 7) // 8 * 8 if vit.is_gated else plain

    return next((ratio for ratio in range(1, 9) if made(ratio) == hidden), None)


def _preprocessor(size: Size) -> dict[str, Any]:
    """``preprocessor_config.json``: the whole image, resized bicubically and normalized."""
    resize = {"do_resize": True, "size": {"height": size[0], "width": size[1]}, "resample": BICUBIC}
    rescale = {"do_rescale": True, "rescale_factor": 1 / 255}
    normalize = {"do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}
    return {"image_processor_type": "ViTImageProcessor", **resize, **rescale, **normalize}


def _load(path: Path) -> Any:
    """The model, read from the folder as any user reads it."""
    from transformers import AutoModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = AutoModel.from_pretrained(path, output_loading_info=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    wrong = {what: keys for what, keys in found.items() if keys}
    if wrong:
        raise RuntimeError(f"{path}: transformers reads it with {wrong}")
    return model.eval()
