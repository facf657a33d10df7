"""Export to the layout of timm's hub: a folder with ``model.safetensors`` and ``config.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.vit import ViT
from pretrain.export.fixed_size import (
    TENSORS,
    Outputs,
    Run,
    Size,
    Usage,
    description,
    outputs_of,
    plain_state,
    refuse,
    require,
    whole_patches,
    write_folder,
)
from pretrain.views.pixels import MEAN, STD
from pretrain.weights.common import registry_name

LN_EPS, ROTARY_LN_EPS = 1e-6, 1e-5  # timm's; its description cannot change it
ALIGNED = 8  # hidden widths of its gated MLPs


def architecture(vit: ViT) -> str:
    """timm's name of the nearest architecture; :func:`model_arguments` adds the rest."""
    if vit.pos_encoding == "rotary":
        return "vit_small_plus_patch16_dinov3" if vit.is_gated else "vit_small_patch16_dinov3"
    if vit.is_gated:
        return "vit_giant_patch14_dinov2"
    return f"{registry_name(vit.embed_dim) or 'vit_base_patch16'}_224"


def model_arguments(vit: ViT, size: Size) -> dict[str, Any]:
    """The JSON arguments of ``timm.create_model(architecture, **arguments)`` for this network."""
    model_kwargs = vit.model_kwargs
    keys = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    arguments: dict[str, Any] = {"img_size": list(size), **{key: model_kwargs[key] for key in keys}}
    if vit.is_gated and vit.pos_encoding != "rotary":
        arguments["mlp_ratio"] *= 2  # of the packed halves
    if model_kwargs["layerscale"] is not None:
        arguments["init_values"] = model_kwargs["layerscale"]
    if vit.pos_encoding == "rotary":
        aligned = {"swiglu_align_to": ALIGNED} if vit.is_gated else {}
        own = {"num_reg_tokens": vit.n_registers, "global_pool": "token"}
        return {**arguments, **own, **aligned, "qkv_bias": vit.qkv_bias != "none"}
    if vit.n_registers:
        arguments["reg_tokens"] = vit.n_registers
    if _embeds_patches_alone(vit):
        arguments["no_embed_class"] = True
    if not vit.has_cls:  # features are then the mean of the normed patches, as in our ViT
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if not model_kwargs["final_norm"]:
        arguments["final_norm"] = False
    if model_kwargs["gelu"] == "tanh":
        arguments["act_layer"] = "gelu_tanh"
    return arguments


def timm_state(vit: ViT, size: Size) -> dict[str, Tensor]:
    """The tensors of timm's network with these :func:`model_arguments`."""
    state = plain_state(vit, size)
    if vit.pos_encoding == "rotary":
        return _rotary_state(vit, state)
    if _embeds_patches_alone(vit):
        state["pos_embed"] = state["pos_embed"][:, int(vit.has_cls) :]
        if vit.has_cls:
            state["cls_token"] = vit.cls_input().detach().clone()
    return state


def _rotary_state(vit: ViT, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict[str, Tensor]()
    for key, value in plain.items():
        if key.endswith("attn.qkv.bias"):
            query, _, rest = value.chunk(3)
            biases = {"q_bias": query.clone(), "v_bias": rest.clone()} if vit.qkv_bias != "none" else {}
            state |= {key.replace("qkv.bias", name): part for name, part in biases.items()}
        elif vit.is_gated and ".fc1." in key:
            gate, up = value.chunk(2)
            state |= {key.replace("fc1", "fc1_g"): gate.clone(), key.replace("fc1", "fc1_x"): up.clone()}
        else:
            state[key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
    if vit.model_kwargs["layerscale"] is None:  # its architecture has one
        scales = (f"blocks.{i}.gamma_{n}" for i in range(len(vit.blocks)) for n in (1, 2))
        state |= {name: torch.ones(vit.embed_dim) for name in scales}
    return state


def export_timm(vit: ViT, size: Size, path: Path, provenance: Mapping[str, Any]) -> Run:
    """A folder that ``timm.create_model("local-dir:...", pretrained=True)`` loads strictly.

    Raises:
        UserError: timm is not installed; its description cannot express the network; see
            :func:`whole_patches`.
    """
    require("timm", "timm")
    import timm

    is_rotary, own = vit.pos_encoding == "rotary", vit.model_kwargs
    departures = {
        "with rotary positions and a bias of the keys": is_rotary and vit.qkv_bias == "all",
        "with rotary positions and the tanh GELU": is_rotary and own["gelu"] == "tanh" and not vit.is_gated,
        "with rotary positions and no [CLS] or no final norm": is_rotary
        and not (vit.has_cls and own["final_norm"]),
    }
    refuse("timm", vit, departures, ROTARY_LN_EPS if is_rotary else LN_EPS)
    grid, told = whole_patches(vit, size), description(vit, size, provenance)
    write_folder(path, timm_state(vit, size), told, config=_config(vit, size))
    model: Any = timm.create_model(f"local-dir:{path}", pretrained=True).eval()

    @torch.no_grad()
    def run(image: Tensor) -> Outputs:
        tokens = model.forward_features(image)
        return outputs_of(vit.split(tokens), grid, model.forward_head(tokens))

    return run


def use_timm(vit: ViT, size: Size, path: str) -> Usage:
    """How to use it."""
    code = f"""import timm

model = timm.create_model({f"local-dir:{path}"!r}, pretrained=True).eval()
cls = model(image)  # [B, D]
patches = model.forward_features(image)[:, {vit.n_prefix}:]  # [B, N, D]"""
    told = ", ".join(f"{key}={value!r}" for key, value in model_arguments(vit, size).items())
    notes = [
        f"The same by hand: `timm.create_model({architecture(vit)!r}, num_classes=0, "
        f"checkpoint_path={f'{path}/{TENSORS}'!r}, {told})`. The arguments also stand in `config.json` as `model_args`.",
        "It takes any size of whole patches."
        if vit.pos_encoding == "rotary"
        else "For another size add `img_size=(height, width)`: timm then resamples `pos_embed` (bicubic, antialiased).",
    ]
    if vit.pos_encoding == "rotary":
        return Usage("timm", code, tuple(notes))
    if vit.n_registers and vit.has_cls:
        said = "as in timm's own networks with registers (`no_embed_class`)"
        notes.append(f"The position of [CLS] is added into `cls_token`, {said}.")
    if not vit.has_cls:
        notes.append("The network has no [CLS]: `cls` above is the mean of the normed patches.")
    return Usage("timm", code, tuple(notes))


def _embeds_patches_alone(vit: ViT) -> bool:
    # with registers, timm would expect rows of ``pos_embed`` for these, too
    return bool(vit.n_registers) or not vit.has_cls


def _config(vit: ViT, size: Size) -> dict[str, Any]:
    """``config.json`` as on timm's hub."""
    arguments = model_arguments(vit, size)
    # the whole image, as in our evaluation
    pixels: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
    pixels |= {"mean": list(MEAN), "std": list(STD)}
    inside = {"num_classes": 0, "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head"}
    return {
        "architecture": architecture(vit),
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "global_pool": arguments.get("global_pool", "token"),
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, *size], "fixed_input_size": True, **pixels, **inside},
    }
