"""Export as a state dict of ``torchvision.models.VisionTransformer``: one image size, LayerScale folded
in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

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
    whole_patches,
    write_tensors,
)

LN_EPS = 1e-6  # torchvision's
OUTSIDE = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
OUTSIDE |= {"patch_embed.proj": "conv_proj", "norm": "encoder.ln"}
INSIDE = {"norm1": "ln_1.", "norm2": "ln_2.", "mlp.fc1": "mlp.0.", "mlp.fc2": "mlp.3."}
INSIDE |= {"attn.qkv": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj."}


def model_arguments(vit: ViT, size: Size) -> dict[str, int]:
    """The arguments of ``VisionTransformer(**arguments)`` for this network."""
    own = vit.model_kwargs
    sizes = {"image_size": size[0], "patch_size": vit.patch_size, "num_layers": own["depth"]}
    hidden = {"hidden_dim": vit.embed_dim, "mlp_dim": int(vit.embed_dim * own["mlp_ratio"])}
    return {**sizes, "num_heads": own["num_heads"], **hidden}


def torchvision_state(vit: ViT, size: Size) -> dict[str, Tensor]:
    """The tensors under torchvision's names, without a head: gamma * (W x + b) is (gamma W) x + gamma b."""
    plain = plain_state(vit, size)
    # blocks.N.ls1.gamma scales attn.proj, ls2 scales mlp.fc2
    for key in [key for key in plain if ".ls" in key]:
        block, scale, _ = key.rsplit(".", 2)
        gamma, module = plain.pop(key), f"{block}.{'attn.proj' if scale == 'ls1' else 'mlp.fc2'}"
        plain[f"{module}.weight"] *= gamma[:, None]
        plain[f"{module}.bias"] *= gamma
    layer = "encoder.layers.encoder_layer_"
    return {renamed(key, OUTSIDE, layer, INSIDE): value for key, value in plain.items()}


def export_torchvision(vit: ViT, size: Size, path: Path, provenance: Mapping[str, Any]) -> Run:
    """``*.safetensors`` with the arguments of the class in its metadata, as JSON under ``arguments``.

    Raises:
        UserError: names what the class cannot express; the size is not square.
    """
    model_kwargs = vit.model_kwargs
    departures = {
        f"with registers (this one has {vit.n_registers})": vit.n_registers > 0,
        "without [CLS]": not vit.has_cls,
        "without a final norm": not model_kwargs["final_norm"],
        "with the tanh GELU": model_kwargs["gelu"] != "erf",
        "with rotary positions": vit.pos_encoding == "rotary",
        "with gated MLPs": vit.is_gated,
    }
    refuse("torchvision", vit, departures, LN_EPS)
    grid = whole_patches(vit, size, "images of torchvision's VisionTransformer are square; give one side")
    arguments, told = json.dumps(model_arguments(vit, size)), description(vit, size, provenance)
    write_tensors(path, torchvision_state(vit, size), arguments=arguments, posfield=told)
    model = _load(path)

    @torch.no_grad()
    def run(image: Tensor) -> Outputs:
        content = model._process_input(image)
        tokens = model.encoder(torch.cat([model.class_token.expand(len(image), -1, -1), content], dim=1))
        return outputs_of(vit.split(tokens), grid, model(image))

    return run


def use_torchvision(vit: ViT, size: Size, path: str) -> Usage:
    """How to use it."""
    told = ", ".join(f"{key}={value}" for key, value in model_arguments(vit, size).items())
    code = f"""import torch
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

model = VisionTransformer({told})
model.heads = torch.nn.Identity()  # the file has no classifier; put your own here afterwards
model.load_state_dict(load_file({path!r}))
model.eval()
cls = model(image)  # [B, D]
tokens = torch.cat([model.class_token.expand(len(image), -1, -1), model._process_input(image)], dim=1)
patches = model.encoder(tokens)[:, 1:]  # [B, N, D]"""
    other = "`torchvision.models.vision_transformer.interpolate_embeddings` makes a file for another one"
    notes = [f"The image size is fixed; {other}."]
    if vit.model_kwargs["layerscale"] is not None:
        notes.append("LayerScale is multiplied into `self_attention.out_proj` and `mlp.3`, which is exact.")
    return Usage("torchvision", code, tuple(notes))


def _load(path: Path) -> Any:
    """The model, read from the file as any user reads it."""
    from torchvision.models import VisionTransformer

    with safe_open(path, framework="pt") as file:
        model = VisionTransformer(**json.loads((file.metadata() or {})["arguments"]))
    model.heads = nn.Identity()
    model.load_state_dict(load_file(path))
    return model.eval()
