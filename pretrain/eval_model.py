"""The checkpoints that an evaluation compares: how they are read and named, and the ``result.json`` of each."""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError, one_line
from pretrain.results.provenance import config_hash, file_hash, provenance
from pretrain.results.schema import FILE_NAME, Protocol, Result, read_result, write_result
from pretrain.weights import backbone_name, read_checkpoint

FOLDER = "checkpoints"  # of an analysis' output: one folder a checkpoint
OF_RUN = "backbone.safetensors"

UsedSettings = Mapping[str, tuple[Any, Any]]  # {name: (value of the protocol, value of this run)}


@dataclass(frozen=True)
class EvalModel:
    """One checkpoint.

    Attributes:
        label: its method, with the file's name or a number where several are of one method; one line.
        path: a file or a folder of weights; of the folder of a pre-training run, the backbone in it.
        backbone: registry name.
        patch_px: side of its patches, as it is built.
        has_token: the file holds a position mask token, and does not say that no loss ever read it.
        source: that of :func:`pretrain.build.build_backbone`.
        seed: of the training that left the file; 0 where it does not say one.
        training: config hash of that training, equal for trainings that differ in their seed alone; None:
            unknown.
        own_patch_px: side of the file's patches; other ones are resampled.
    """

    label: str
    path: Path
    backbone: str
    patch_px: int
    method: str
    effective_epochs: float | None = None
    has_token: bool = False
    source: str | None = None
    seed: int = 0
    training: str | None = None
    own_patch_px: int = 0

    @property
    def folder(self) -> str:
        """``checkpoints/NAME``, another one for each label: of letters, digits, ``-``, ``_`` and ``.``."""
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.label).strip(".")[:60]
        if not safe or safe != self.label:
            safe += f"-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"
        return f"{FOLDER}/{safe}"

    def build(self, mask_tokens: bool = False) -> ViT:
        """The backbone in evaluation mode, on the CPU; ``mask_tokens``: new ones where the file has none."""
        how: dict[str, Any] = {"source": self.source, "patch_size": self.patch_px, "mask_tokens": mask_tokens}
        return build_backbone(self.backbone, self.path, **how).eval()

    def settings_hash(self, protocol: str, settings: UsedSettings) -> str:
        """The ``config_hash`` of :meth:`write`."""
        return config_hash(self._used(protocol, settings))

    def found(self, folder: Path, protocol: str, settings: UsedSettings) -> Result | None:
        """What :meth:`write` left before, of the same weights and settings; None: no such result."""
        if not (folder / FILE_NAME).is_file():
            return None
        before = read_result(folder)
        asked = self.settings_hash(protocol, settings), file_hash(self.path, before.weights_hash)
        return before if (before.config_hash, before.weights_hash) == asked else None

    def write(
        self, folder: Path, protocol: str, settings: UsedSettings, metrics: Mapping[str, Any], started: float
    ) -> None:
        """Leave ``folder/result.json``, of kind ``analysis``.

        Args:
            protocol: its name; version 1.
            settings: a run is full where no value differs from the protocol's.
            started: ``time.perf_counter()`` at its beginning.
        """
        changed = {name: list(pair) for name, pair in settings.items() if pair[0] != pair[1]}
        if self.own_patch_px not in (0, self.patch_px) and "patch_px" not in settings:
            changed["patch_size"] = [self.own_patch_px, self.patch_px]
        followed = Protocol(name=protocol, version=1, full=not changed, deviations=changed)
        used, took = self._used(protocol, settings), time.perf_counter() - started
        self.write_result(folder, "analysis", followed, used, metrics, seed=0, wall_time_s=took)

    def write_result(
        self,
        folder: Path,
        kind: Literal["analysis", "dense"],
        protocol: Protocol,
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        **others: Any,
    ) -> Path:
        """Leave ``folder/result.json`` and return its path.

        Args:
            config: all that the numbers depend on, but for the weights.
            others: further fields of the result.
        """
        result = Result(
            kind=kind,
            method=self.method,
            backbone=self.backbone,
            patch_px=self.patch_px,
            effective_epochs=self.effective_epochs,
            protocol=protocol,
            metrics=dict(metrics),
            **{**provenance(config, self.path), **others},
        )
        return write_result(result, folder)

    def _used(self, protocol: str, settings: UsedSettings) -> dict[str, Any]:
        built = {"backbone": self.backbone, "patch_px": self.patch_px, "source": self.source}
        return {"protocol": protocol, **built, **{name: pair[1] for name, pair in settings.items()}}


def open_models(
    paths: Sequence[Path],
    names: Sequence[str] = (),
    source: str | None = None,
    backbone: str | None = None,
    patch_px: int | None = None,
) -> list[EvalModel]:
    """The checkpoints of these files, in order. Every file is read now, so that a bad one fails at the start.

    Args:
        paths: files or folders of weights; the folder of a pre-training run stands for its backbone.
        names: of their methods, one a file; none: what the files say, else the files' names.
        source, backbone, patch_px: of all files, ``backbone`` where they do not say it.

    Raises:
        UserError: a file that cannot be read, or is of no registered size; names that are empty, not unique,
            or not as many as the files.
    """
    if names and len(names) != len(paths):
        raise UserError(f"--names: {len(names)} names for {len(paths)} files of weights")
    for name in names:
        n = names.count(name)
        if not name.strip() or n > 1:
            raise UserError(f"--names: {name!r} names {n} weights; give each a name of its own")
    if patch_px is not None and patch_px < 1:
        raise UserError(f"--patch-size: {patch_px} is less than 1")
    paths = [path / OF_RUN if (path / OF_RUN).is_file() else path for path in paths]
    models = []
    for i, path in enumerate(paths):
        checkpoint = read_checkpoint(path, source)
        said = checkpoint.provenance
        epochs, seed, training = (said.get(key) for key in ("effective_epochs", "seed", "config_hash"))
        model = EvalModel(
            label="",
            path=path,
            backbone=backbone_name(backbone, checkpoint),
            patch_px=patch_px or int(checkpoint.model_kwargs["patch_size"]),
            method=one_line(names[i] if names else str(said.get("method") or _stem(path))),
            effective_epochs=None if epochs is None else float(epochs),
            has_token="pos_mask_token" in checkpoint.state and bool(said.get("position_masks", True)),
            source=source,
            seed=seed if type(seed) is int and 0 <= seed < 2**32 else 0,
            training=training if isinstance(training, str) else None,
            own_patch_px=int(checkpoint.model_kwargs["patch_size"]),
        )
        models.append(model)
    return named_apart(models)


def named_apart(models: Sequence[EvalModel]) -> list[EvalModel]:
    """The same with unique labels: the method, with the file's name or a number where methods repeat."""
    labels = [model.method for model in models]
    for texts in ([_stem(model.path) for model in models], [f"#{i}" for i in range(1, len(models) + 1)]):
        counts = Counter(labels)
        told = [text if counts[label] > 1 and text != label else "" for label, text in zip(labels, texts)]
        labels = [f"{label}, {text}" if text else label for label, text in zip(labels, told)]
    return [replace(model, label=label) for model, label in zip(models, map(one_line, labels))]


def _stem(path: Path) -> str:
    """A file's or folder's name; of ``backbone.safetensors``, as every run calls it, the folder's."""
    path = path.absolute()
    return path.parent.name if path.name == OF_RUN else path.name if path.is_dir() else path.stem
