"""Open a file of weights without running anything in it: safetensors, a pickle of plain tensors, or a folder that holds one.

What is inside stays as it is: which tensors they are is for the sources (:mod:`pretrain.weights.sources`) to say.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import UserError

WRAPPERS = ("state_dict", "model")  # of a flat state dict, in files that hold no more than that


@dataclass(frozen=True)
class Container:
    """An opened file.

    Attributes:
        path: what the user named, a file or a folder.
        tree: what the file holds: a flat state dict, or nested dictionaries of such and of plain values.
        metadata: of a safetensors file.
        config: ``config.json`` (Hugging Face, timm's hub) beside the weights, or empty.
        preprocessor: ``preprocessor_config.json`` beside the weights, or empty.
    """

    path: Path
    tree: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, *wrappers: str) -> dict[str, Tensor] | None:
        """The flat state dict under one of these keys (the first there is), else at the top; none if there is no such thing."""
        for key in wrappers:
            if is_state(self.tree.get(key)):
                return dict(self.tree[key])
        return dict(self.tree) if is_state(self.tree) else None

    @property
    def flat(self) -> dict[str, Tensor]:
        """The state dict of a file that holds only one, wrapped or not; empty for any other file."""
        return self.tensors(*WRAPPERS) or {}


def is_state(content: Any) -> bool:
    """Whether this is a non-empty dictionary of names and tensors."""
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def open_container(path: str | Path) -> Container:
    """Open ``path`` on the CPU.

    Raises:
        UserError: no such file, unreadable, or not of plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: no file {path}")
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
        return Container(path, state, metadata, _json_beside(path, "config.json"), _json_beside(path, "preprocessor_config.json"))
    return Container(path, _read_pickle(path))


def _json_beside(path: Path, name: str) -> dict[str, Any]:
    beside = path.parent / name
    if not beside.is_file():
        return {}
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"weights: {beside} is no readable JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights: {path} is no readable safetensors file ({error})") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler fails in any way: KeyError, IndexError, struct.error, ...
        raise UserError(f"weights: {path} is no checkpoint of plain tensors ({type(error).__name__})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"weights: {path} holds no flat state dict")
    return content
