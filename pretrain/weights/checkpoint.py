"""What every source returns: a file's tensors under our names, and the arguments of the network that they
belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors under our names, and what it says about the network they belong to.

    Attributes:
        state: {our name: tensor}, on the CPU.
        model_kwargs: the arguments of :class:`pretrain.backbones.vit.ViT` that the file determines.
        backbone: registry name, if the file or its shapes tell it.
        provenance: JSON values that later stages report: ``source`` (a name of
            :data:`pretrain.weights.sources.SOURCES`), ``method`` (as tables write it), ``effective_epochs``
            if the file says it, ...
        depth_is_counted: only the highest block number tells the depth, so a file that lost its last blocks
            looks whole.
    """

    path: Path
    state: Mapping[str, Tensor]
    model_kwargs: Mapping[str, Any]
    backbone: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    depth_is_counted: bool = False
