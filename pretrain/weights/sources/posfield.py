"""Our own file, ``backbone.safetensors``, with all arguments of the ViT in its metadata
(:mod:`pretrain.weights.write`)."""

import json

from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.container import Container
from pretrain.weights.layout import only_network
from pretrain.weights.sources.source import Match, Source
from pretrain.weights.write import FORMAT, FORMAT_VERSION


def match(file: Container) -> Match:
    """By the format in the metadata."""
    return Match.MARKED if file.metadata.get("format") == FORMAT else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The tensors as they are."""
    path, metadata = file.path, file.metadata
    if metadata.get("format") != FORMAT:
        raise UserError(f"weights: {path} is no file of posfield's: its metadata names no format {FORMAT}")
    only_network(path, "posfield", subnet)
    try:
        version = int(metadata["format_version"])
        if version > FORMAT_VERSION:
            raise UserError(
                f"weights: {path} has format version {version}; this posfield reads up to {FORMAT_VERSION}"
            )
        model_kwargs, provenance = json.loads(metadata["flags"]), json.loads(metadata["provenance"])
        return Checkpoint(
            path,
            file.tensors() or {},
            model_kwargs,
            metadata["backbone"],
            {"source": "posfield", **provenance},
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"weights: {path} has damaged metadata ({error})") from error


SOURCES = (Source("posfield", "posfield", match, convert),)
