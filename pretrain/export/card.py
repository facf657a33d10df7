"""A model card in Hugging Face's format. It says what is known of a backbone, and "unknown" for the rest."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.backbones.vit import ViT
from pretrain.errors import ensure
from pretrain.export.checked import FORMATS
from pretrain.export.fixed_size import Size
from pretrain.results.dense import dense_table
from pretrain.results.pages import from_template
from pretrain.results.render import render
from pretrain.results.rows import backbone_label
from pretrain.results.runs import find_results
from pretrain.results.schema import Result, read_result
from pretrain.results.tables import (
    comparison_table,
    epochs_text,
    posttraining_table,
    pretraining_table,
    segmentation_table,
)
from pretrain.views.pixels import MEAN, STD
from pretrain.weights import license_of
from pretrain.weights.common import registry_name

UNKNOWN = "unknown"
TOLD = {
    "source": "Read as",
    "subnet": "Network in the file",
    "weights_hash": "Made from a file of SHA-256 (first 12 digits)",
    "config_hash": "Config hash",
    "seed": "Seed",
    "patch_size_before": "Patch size before resampling (px)",
    "fine_tuned": "Fine-tuned",
}


def results_of(paths: Iterable[str | Path], hashes: set[str]) -> list[Result]:
    """The results under ``paths`` that were measured with weights of one of ``hashes``.

    Raises:
        UserError: there is no such result.
    """
    found = [read_result(path) for path in find_results(paths)]
    own = [result for result in found if result.weights_hash in hashes]
    said = f"none of the {len(found)} there was measured with these weights ({', '.join(sorted(hashes))})"
    ensure(own, f"results: {said}")
    return own


def model_card(
    vit: ViT,
    format: str,
    size: Size,
    difference: float,
    *,
    file: str,
    file_hash: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    results: Sequence[Result] = (),
) -> str:
    """The text of a ``README.md``.

    Args:
        format, size, difference: those of :func:`pretrain.export.export`, and what it returned.
        file: the name of the file or folder that the reader has.
        file_hash: of the exported weights (:func:`pretrain.results.file_hash`).
        provenance: what those weights say about themselves.
        results: measured with them; see :func:`results_of`.
    """
    told, epochs = dict(provenance or {}), (provenance or {}).get("effective_epochs")
    tables = [segmentation_table(results), dense_table(results, [])]
    tables += [posttraining_table(results), pretraining_table(results)]
    comparison = comparison_table(results, published=[], table="all")
    return from_template(
        "card.md",
        vit=vit,
        told=told,
        size=size,
        difference=difference,
        architecture=_architecture(vit),
        usage=FORMATS[format].use(vit, size, file),
        license=license_of(told),
        epochs=UNKNOWN if epochs is None else epochs_text(float(epochs)),
        n_parameters=sum(p.numel() for p in vit.parameters()),
        grid=vit.grid_of(size),
        mean=list(MEAN),
        std=list(STD),
        origin=_origin(told, file_hash) | {"Format": format, "posfield": _version()},
        # the same tables as everywhere else; they mark a run that was scaled down
        tables=[
            render(t, "md") for t in ([comparison] if comparison.records else []) + tables if t is not None
        ],
    )


def _architecture(vit: ViT) -> str:
    """ "ViT-S/16, 4 registers"."""
    name = registry_name(vit.embed_dim, swiglu=vit.is_gated)
    label = backbone_label(name).partition("/")[0] if name else f"ViT of width {vit.embed_dim}"
    return f"{label}/{vit.patch_size}" + (f", {vit.n_registers} registers" if vit.n_registers else "")


def _version() -> str:
    try:
        return metadata.version("posfield")
    except metadata.PackageNotFoundError:
        return UNKNOWN


def _origin(told: Mapping[str, Any], file_hash: str | None) -> dict[str, Any]:
    rows = {"Exported from a file of SHA-256 (first 12 digits)": file_hash or UNKNOWN}
    rows |= {label: told[key] for key, label in TOLD.items() if told.get(key) not in (None, file_hash)}
    start = told.get("started_from")
    # continued or post-trained: method, epochs and data above are those of its last training
    if isinstance(start, Mapping):
        epochs = start.get("effective_epochs")
        trained = f", {epochs_text(epochs)} effective epochs" if isinstance(epochs, int | float) else ""
        method, file = start.get("method", "method unknown"), start.get("hash", UNKNOWN)
        rows["Started from"] = f"{method}{trained}, file of SHA-256 {file}"
    return rows
