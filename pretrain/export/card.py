"""A model card in Hugging Face's format. It says what is known of a backbone, and "unknown" for the rest."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.backbones.vit import ViT
from pretrain.errors import UserError
from pretrain.export.checked import FORMATS
from pretrain.export.fixed_size import Size, Usage, positions_note
from pretrain.results.dense import dense_table
from pretrain.results.render import markdown_text, render
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
from pretrain.weights.common import registry_name

UNKNOWN = "unknown"
FRONT_MATTER = """---
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- vision-transformer
- posfield
# license: for whoever publishes these weights to state
---
"""
INTRODUCTION = (
    "A Vision Transformer backbone for image features, without a head. Written by posfield; what the weights do not say of "
    "themselves is given as unknown."
)
LICENSE = (
    "Not stated here. The license of the weights, and of the images that they were trained on, is for whoever publishes them to "
    "state; posfield's own license covers its code alone."
)
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
    if not own:
        raise UserError(
            f"results: none of the {len(found)} there was measured with these weights ({', '.join(sorted(hashes))})"
        )
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
    told, usage = dict(provenance or {}), FORMATS[format].use(vit, size, file)
    method = markdown_text(str(told["method"])) if told.get("method") else "method unknown"
    sections = {
        "Positions": [positions_note(vit, size)],
        "Loading": _loading(usage, size, difference),
        "Where it comes from": _table(_origin(told, file_hash, format)),
        "Results": _results(results),
        "License": [LICENSE],
        "Limits": _limits(vit, size, told),
    }
    title = f"# {_architecture(vit)}, {method}"
    lines = [
        FRONT_MATTER.format(library=usage.library),
        title,
        "",
        INTRODUCTION,
        "",
        *_table(_what(vit, told)),
    ]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def _loading(usage: Usage, size: Size, difference: float) -> list[str]:
    image = (
        f"`image` is [B, 3, {size[0]}, {size[1]}], RGB from 0 to 1, minus the mean {list(MEAN)}, divided by the deviation "
        f"{list(STD)}. posfield's own evaluation resizes the whole picture (bicubic, antialiased)."
    )
    checked = (
        f"Read again by the library after it was written, on noise of {size[0]} x {size[1]} px in float32, its outputs differed "
        f"from posfield's network by {difference:.1e} of their largest value, at most."
    )
    return [image, "", "```python", usage.code, "```", "", *(f"- {note}" for note in (*usage.notes, checked))]


def _architecture(vit: ViT) -> str:
    """ "ViT-S/16, 4 registers"."""
    name = registry_name(vit.embed_dim)
    label = backbone_label(name) if name else f"ViT of width {vit.embed_dim}"
    label = f"{label.partition('/')[0]}/{vit.patch_size}"
    return label + (f", {vit.n_registers} registers" if vit.n_registers else "")


def _what(vit: ViT, told: Mapping[str, Any]) -> list[tuple[str, str]]:
    own, epochs = vit.model_kwargs, told.get("effective_epochs")
    positions = {"field": f"a field of {vit.pos_grid} x {vit.pos_grid} samples", "none": "none"}
    learned = f"one vector for each of {vit.pos_grid} x {vit.pos_grid} patches"
    gelu = "exact" if own["gelu"] == "erf" else "tanh approximation"
    rows = {
        "Method": told.get("method") or UNKNOWN,
        "Effective epochs": UNKNOWN if epochs is None else epochs_text(float(epochs)),
        "Pre-training data": told.get("data") or UNKNOWN,
        "Parameters": f"{sum(p.numel() for p in vit.parameters()) / 1e6:.1f} M before the export",
        "Blocks, width, heads": f"{own['depth']}, {own['embed_dim']}, {own['num_heads']}",
        "MLP ratio, GELU": f"{own['mlp_ratio']:g}, {gelu}",
        "Patch": f"{vit.patch_size} px",
        "[CLS], registers": f"{'yes' if vit.has_cls else 'no'}, {vit.n_registers}",
        "LayerScale": "yes" if own["layerscale"] is not None else "none",
        "Final norm, epsilon": f"{'yes' if own['final_norm'] else 'no'}, {own['ln_eps']:g}",
        "Positions, as learned": positions.get(vit.pos_encoding, learned),
    }
    return [(key, str(value)) for key, value in rows.items()]


def _origin(told: Mapping[str, Any], file_hash: str | None, format: str) -> list[tuple[str, str]]:
    try:
        version = metadata.version("posfield")
    except metadata.PackageNotFoundError:
        version = UNKNOWN
    rows = [("Exported from a file of SHA-256 (first 12 digits)", file_hash or UNKNOWN)]
    for key, label in TOLD.items():
        if told.get(key) is not None and told[key] != file_hash:
            rows.append((label, str(told[key])))
    start = told.get("started_from")
    # continued or post-trained: method, epochs and data above are those of its last training
    if isinstance(start, Mapping):
        epochs = start.get("effective_epochs")
        trained = f", {epochs_text(epochs)} effective epochs" if isinstance(epochs, int | float) else ""
        method, file = start.get("method", "method unknown"), start.get("hash", UNKNOWN)
        rows.append(("Started from", f"{method}{trained}, file of SHA-256 {file}"))
    return [*rows, ("Format", format), ("posfield", version)]


def _results(results: Sequence[Result]) -> list[str]:
    """The same tables as everywhere else. They mark a run that was scaled down."""
    tables = [segmentation_table(results), dense_table(results, [])]
    tables += [posttraining_table(results), pretraining_table(results)]
    comparison = comparison_table(results, published=[], table="all")
    if comparison.records:
        tables.insert(0, comparison)
    shown = [render(table, "md") for table in tables if table is not None]
    return ["\n".join(shown).rstrip()] if shown else ["None were given when this card was written."]


def _limits(vit: ViT, size: Size, told: Mapping[str, Any]) -> list[str]:
    lines = ["- Features only: there is no classifier, detector or segmenter in it."]
    lines.append(
        f"- Checked at {size[0]} x {size[1]} px. At any other size positions are resampled by the library, or it refuses."
    )
    if told.get("patch_size_before"):
        lines.append(
            f"- The patch projection was resampled from {told['patch_size_before']} to {vit.patch_size} px: features are not those "
            "of the original network on the same image."
        )
    return [*lines, "- The images of the pre-training are not described here, and neither are their biases."]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"| {markdown_text(key)} | {markdown_text(value)} |" for key, value in rows]
    return ["| | |", "|---|---|", *lines]
