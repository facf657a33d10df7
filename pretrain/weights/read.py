"""Read a checkpoint: our own safetensors, or a timm-style state dict (safetensors or a tensors-only ``.pth``).

Nothing in a file is executed: pickles are read with torch's tensors-only loader. A tensor that is missing, left over or of
another shape is an error that names it; nothing is dropped silently.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.weights.write import FORMAT, FORMAT_VERSION

TRAINING_ONLY = ("mask_token", "pos_mask_token")  # read by pre-training and position probes, dropped elsewhere


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors under our names, and what it says about the network they belong to."""

    path: Path
    state: Mapping[str, Tensor]
    flags: Mapping[str, Any]  # arguments of ViT
    backbone: str | None = None  # registry name, where the file says it
    provenance: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read ``path`` on the CPU.

    Raises:
        UserError: no such file, unreadable, or of no supported layout.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: no file {path}")
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        state, metadata = _read_pickle(path), {}
    if metadata.get("format") == FORMAT:
        return _own(path, state, metadata)
    return _timm(path, state)


def backbone_name(name: str | None, weights: str | Path | None) -> str:
    """The registry name that a user means: the one given, else the one that a file of ours says.

    Raises:
        UserError: neither is there.
    """
    if name is not None:
        return name
    if weights is None:
        raise UserError("backbone: a name is needed, or weights with a file of ours that says it")
    found = read_checkpoint(weights).backbone
    if found is None:
        raise UserError(f"backbone: {weights} does not say which backbone it is; give the name")
    return found


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights: {path} is no readable safetensors file ({error})") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler fails in any way: KeyError, IndexError, struct.error, ...
        raise UserError(f"weights: {path} is no checkpoint of plain tensors ({type(error).__name__})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights: {path} holds no flat state dict")
    return content


def _own(path: Path, state: dict[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    version = int(metadata["format_version"])
    if version > FORMAT_VERSION:
        raise UserError(f"weights: {path} has format version {version}; this posfield reads up to {FORMAT_VERSION}")
    return Checkpoint(path, state, json.loads(metadata["flags"]), metadata["backbone"], json.loads(metadata["provenance"]))


def _timm(path: Path, state: dict[str, Tensor]) -> Checkpoint:
    """A state dict under timm's names; its flags are read off the shapes. A classifier (``head.*``) is not the backbone's."""
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "fc_norm."))}
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise UserError(f"weights: {path} is neither posfield's nor a timm ViT: no tensor {', '.join(absent)}")
    dim, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[2]
    n_positions, n_registers = state["pos_embed"].shape[1], 0
    if "reg_token" in state:  # timm's no_embed_class: the position of [CLS] is already inside cls_token
        n_registers = state["reg_token"].shape[1]
        if math.isqrt(n_positions) ** 2 == n_positions:
            zero = torch.zeros_like(state["pos_embed"][:, :1])
            state["pos_embed"] = torch.cat([zero, state["pos_embed"]], dim=1)
            n_positions += 1
    side = math.isqrt(n_positions - 1)
    if side * side != n_positions - 1:
        raise UserError(f"weights: {path}: pos_embed has {n_positions} positions, not 1 + a square grid")
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    flags: dict[str, Any] = dict(
        embed_dim=dim,
        depth=depth,
        patch_size=patch,
        n_registers=n_registers,
        layerscale=1e-5 if "blocks.0.ls1.gamma" in state else None,
        pos_encoding="standard",
        pos_grid=side,
        pos_interpolation="bicubic_antialias",
        mask_tokens=False,
    )
    return Checkpoint(path, state, flags)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the tensors; training-only tokens are dropped where the model holds none, and stay fresh where the file never had any.

    Raises:
        UserError: names each tensor that is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    given = {k: v for k, v in checkpoint.state.items() if k in wanted or k not in TRAINING_ONLY}
    if not checkpoint.flags.get("mask_tokens"):
        given |= {key: wanted[key] for key in TRAINING_ONLY if key in wanted}
    problems = [f"missing {key}" for key in wanted if key not in given]
    problems += [f"left over {key}" for key in given if key not in wanted]
    problems += [
        f"{key} is {tuple(given[key].shape)} in the file and {tuple(wanted[key].shape)} in the model"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"weights: {checkpoint.path} does not fit the backbone: {shown}")
    model.load_state_dict(dict(given))
