"""Our own file, ``backbone.safetensors``: the tensors under timm's names, and all arguments of the ViT in the
metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pretrain.errors import UserError, ensure
from pretrain.files import replacing, write_safetensors
from pretrain.weights.common import Checkpoint, Match, Source, only_network
from pretrain.weights.container import Container

FORMAT = "posfield-backbone"
FORMAT_VERSION = 1


def save_backbone(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    name: str,
    model_kwargs: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a backbone so that ``build_backbone(name, weights=path)`` and every plug-in can build it again.

    Args:
        path: the file, ``*.safetensors``; it is replaced atomically. The same state
            gives the same bytes.
        state: a ViT's ``state_dict()``.
        name: its registry name, e.g. ``vit_small_patch16``.
        model_kwargs: ``ViT.model_kwargs``.
        provenance: JSON values that later stages report: method, effective epochs, seed, config hash, ...
    """
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "backbone": name,
        "flags": json.dumps(dict(model_kwargs), sort_keys=True),
        "provenance": json.dumps(dict(provenance or {}), sort_keys=True),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    with replacing(path) as partial:  # save_file would make a file that only its owner can read
        write_safetensors(partial, save(tensors, metadata=metadata))
    return path


def match(file: Container) -> Match:
    """By the format in the metadata."""
    return Match.MARKED if file.metadata.get("format") == FORMAT else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The tensors as they are."""
    path, said, read = file.path, file.metadata, f"this posfield reads up to {FORMAT_VERSION}"
    ours = said.get("format") == FORMAT
    ensure(ours, f"weights: {path} is no file of posfield's: its metadata names no format {FORMAT}")
    only_network(subnet)
    try:
        version = int(said["format_version"])
        ensure(version <= FORMAT_VERSION, f"weights: {path} has format version {version}; {read}")
        model_kwargs, provenance = json.loads(said["flags"]), json.loads(said["provenance"])
        return Checkpoint(path, file.tensors() or {}, model_kwargs, said["backbone"], {**provenance})
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"weights: {path} has damaged metadata ({error})") from error


SOURCES = (Source("posfield", "posfield", match, convert),)
