"""The checkpoints that an analysis compares: read one after the other, named apart, and what each leaves in its ``result.json``."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results.provenance import provenance
from pretrain.results.schema import Protocol, Result, write_result
from pretrain.weights import backbone_name, read_checkpoint


@dataclass(frozen=True)
class Subject:
    """One checkpoint.

    Attributes:
        label: its method, with the file's name or number where several are of one method.
        path: its file; of the folder of a pre-training run, the backbone in it.
        folder: a name for its folder, of letters, digits, ``-``, ``_`` and ``.``.
        has_token: the file holds a learned position mask token.
    """

    path: Path
    label: str
    folder: str
    name: str
    method: str
    effective_epochs: float | None
    has_token: bool
    source: str | None = None

    def build(self, mask_tokens: bool = False) -> ViT:
        """The backbone, in evaluation mode, on the CPU; with ``mask_tokens``, fresh ones where the file holds none."""
        return build_backbone(self.name, weights=self.path, source=self.source, mask_tokens=mask_tokens).eval()

    def write(
        self,
        folder: Path,
        protocol: str,
        settings: Mapping[str, tuple[Any, Any]],
        metrics: Mapping[str, Any],
        started: float,
        *,
        seed: int = 0,
    ) -> None:
        """Leave ``folder/result.json``, of kind ``analysis``.

        Args:
            protocol: its name; version 1.
            settings: {name: (value of the protocol, value of this run)}; where they differ the run is no full one.
            started: ``time.perf_counter()`` at its beginning.
        """
        changed = {name: list(pair) for name, pair in settings.items() if pair[0] != pair[1]}
        used = {"protocol": protocol, **{name: pair[1] for name, pair in settings.items()}}
        result = Result(
            kind="analysis",
            method=self.method,
            backbone=self.name,
            effective_epochs=self.effective_epochs,
            protocol=Protocol(name=protocol, version=1, full=not changed, deviations=changed),
            metrics=dict(metrics),
            seed=seed,
            wall_time_s=time.perf_counter() - started,
            **provenance(used, self.path if self.path.is_file() else None),
        )
        write_result(result, folder)


def open_subjects(
    paths: Sequence[Path], backbone: str | None = None, names: Sequence[str] | None = None, source: str | None = None
) -> list[Subject]:
    """The checkpoints of these files, in order; every file is read once now, so that a bad one is told before the first hour.

    Args:
        backbone: registry name of all of them, where the files do not say it.
        names: of their methods, one a file; none: what the files say.
        source: that of :func:`pretrain.weights.read_checkpoint`, for all files.

    Raises:
        UserError: a file that cannot be read (:func:`pretrain.weights.read_checkpoint`), or is of no registered size; names that
            are not as many as the files.
    """
    if names is not None and len(names) != len(paths):
        raise UserError(f"--names: {len(names)} names for {len(paths)} files of weights")
    paths = [path / "backbone.safetensors" if (path / "backbone.safetensors").is_file() else path for path in paths]
    known = [_known(path, backbone, source) for path in paths]
    methods = list(names or (method for method, *_ in known))
    labels = methods
    for texts in ([_stem(path) for path in paths], [f"#{i}" for i in range(1, len(paths) + 1)]):
        counts = Counter(labels)
        labels = [f"{label}, {text}" if counts[label] > 1 else label for label, text in zip(labels, texts)]
    return [
        Subject(path, label, f"{i}-{_folder(label)}", name, method, epochs, has_token, source)
        for i, (path, label, method, (_, name, epochs, has_token)) in enumerate(zip(paths, labels, methods, known), 1)
    ]


def _known(path: Path, backbone: str | None, source: str | None) -> tuple[str, str, float | None, bool]:
    """Method, registry name, effective epochs and whether there is a position mask token; the tensors are let go."""
    checkpoint = read_checkpoint(path, source)
    said = checkpoint.provenance
    method, epochs = str(said.get("method") or path.stem), said.get("effective_epochs")
    name = backbone or checkpoint.backbone or backbone_name(None, path, source)
    return method, name, None if epochs is None else float(epochs), "pos_mask_token" in checkpoint.state


def _folder(label: str) -> str:
    """A label as the name of a folder."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in label).strip("-.")[:100]


def _stem(path: Path) -> str:
    """``runs/x/backbone.safetensors`` -> ``x/backbone``: the files of runs all have one name."""
    return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem
