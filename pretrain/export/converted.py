"""Any supported file of weights as one of ours: ``backbone.safetensors``, with every build flag and its origin in the metadata."""

from pathlib import Path
from typing import Any

from pretrain.build import build_backbone
from pretrain.results.provenance import file_hash
from pretrain.weights import backbone_name, read_checkpoint, save_backbone


def convert(
    weights: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    source: str | None = None,
    subnet: str | None = None,
    patch_size: int | None = None,
    method: str | None = None,
    effective_epochs: float | None = None,
) -> Path:
    """Write ``weights`` as a file that every part of posfield reads without being told what it is.

    Args:
        output: ``*.safetensors``, replaced in one step.
        name, source, subnet, patch_size: those of :func:`pretrain.build.build_backbone`; none: as the file says.
        method, effective_epochs: what tables write of it; none: what the source says.

    Raises:
        UserError: all that :func:`pretrain.build.build_backbone` raises.
    """
    found = read_checkpoint(weights, source, subnet)
    name = backbone_name(name, weights, source)
    flags: dict[str, Any] = {} if patch_size is None else {"patch_size": patch_size}
    vit = build_backbone(name, weights, source=source, subnet=subnet, **flags)
    provenance = {**found.provenance, "weights_hash": file_hash(weights)}
    if patch_size not in (None, found.flags["patch_size"]):
        provenance["patch_size_before"] = found.flags["patch_size"]
    if method is not None:
        provenance["method"] = method
    if effective_epochs is not None:
        provenance["effective_epochs"] = effective_epochs
    return save_backbone(output, vit.state_dict(), name=name, flags=vit.flags, provenance=provenance)
