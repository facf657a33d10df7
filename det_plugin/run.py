"""One detection fine-tuning, for either engine: its inputs, and the ``result.json`` that it leaves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from det_plugin.protocol import ADDED, DetectionProtocol, deviations, other_images
from pretrain.build import PROTOCOL_PATCH_PX, network_kwargs
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.results import renamed
from pretrain.results.provenance import provenance
from pretrain.results.schema import FILE_NAME, Protocol, finished, planned, write_result
from pretrain.settings import as_dict

# {engine: the config that its runs leave in their folders}
CONFIGS = {"torchvision": "config.json", "detectron2": "config_resolved.yaml"}


def engine_of(folder: Path) -> str | None:
    """The engine of the run in a folder; None where there is none."""
    return next((engine for engine, file in CONFIGS.items() if (folder / file).is_file()), None)


def required_engine(folder: Path) -> str:
    """:func:`engine_of` a folder that has to hold a run.

    Raises:
        UserError: it holds none.
    """
    if engine := engine_of(folder):
        return engine
    files = " nor ".join(CONFIGS.values())
    raise UserError(f"{folder} is no folder of a detection run: it holds neither {files}")


@dataclass(frozen=True)
class DetectionRun:
    """Everything that the outcome of a run depends on, and where it goes.

    Attributes:
        backbone: registry name.
        weights: the backbone's checkpoint; None: random initialization.
        data: root of a COCO-format set in any layout, or a .yaml file (:mod:`det_plugin.coco.layout`).
        output: run folder.
        protocol: the recipe (full or scaled down).
        model_kwargs: further arguments of ``build_backbone``.
        accumulate: micro-batches a step; 0: as few as fit into the GPU's memory. The schedule does not change.
        checkpointing, compile: of :class:`det_plugin.features.FeatureOptions`; only for speed and memory.
        is_sure: the protocol may be far too long for the data.

    Raises:
        UserError: the seed or the number of workers is out of range.
    """

    backbone: str
    weights: Path | None
    data: Path
    output: Path
    protocol: DetectionProtocol
    seed: int = 0
    device: str = "auto"
    workers: int = 2
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    is_sure: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # what numpy takes
            raise UserError(f"seed: {self.seed} must be within 0 and 2 ** 32 - 1")
        if self.workers < 0:
            raise UserError(f"workers: {self.workers} must be at least 0")

    def settings(self) -> dict[str, Any]:
        """What defines the outcome, as plain values. No folder of this machine is in it."""
        recipe = {key: value for key, value in as_dict(self.protocol).items() if key not in ADDED}
        recipe |= self.protocol.added
        return {
            "backbone": self.backbone,
            "model_kwargs": network_kwargs(self.model_kwargs),
            "protocol": recipe,
            "seed": self.seed,
        }


def first_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the first names of their keys: a renamed key must not change a run's config hash."""
    first = {new: old for old, new in renamed.FINE_TUNING.items()} | {"deviations": "departures"}
    return {first.get(k, k): first_names(v) if isinstance(v, Mapping) else v for k, v in settings.items()}


def run_deviations(run: DetectionRun, images: tuple[int, int], n_shared: int = 0) -> dict[str, list[Any]]:
    """Where a run differs from the protocol that it is named after: ``{field: [protocol's, run's]}``.

    Args:
        images: how many images it was trained on, and evaluated on.
        n_shared: how many were both.
    """
    changed = deviations(run.protocol, run.backbone)
    changed |= other_images(*images, run.protocol.train_share)
    changed |= {"shared_images": [0, n_shared]} if n_shared else {}
    if run.protocol.amp and choose_device(run.device).type != "cuda":
        changed["amp"] = [True, False]
    if given := network_kwargs(run.model_kwargs):
        changed["model_kwargs"] = [{}, given]
    return changed


def metrics_to_come(classes: Iterable[str]) -> dict[str, Any]:
    """What stands for a run's metrics at its start: those by class hold the names of the data's classes."""
    return {"box_ap_classes": dict.fromkeys(classes, 0.0)}


def leave_result(
    run: DetectionRun,
    metrics: Mapping[str, Any],
    changed: dict[str, list[Any]],
    *,
    origin: Mapping[str, Any],
    wall_time_s: float,
    hashed: Mapping[str, Any],
    begins: bool = False,
) -> Path:
    """Write ``result.json`` into the run's folder, or find out at the run's start whether it could be.

    Args:
        metrics: ``box_ap``, ``mask_ap``, ... in percent.
        changed: the run's deviations.
        origin: :func:`origin_of` the weights, read before the training: the file may be gone after it.
        hashed: what the config hash covers besides :meth:`DetectionRun.settings`: ``engine``, ...
        begins: the run only begins: nothing is written; the metrics stand for those to come.

    Raises:
        UserError: at the start: it could not be written.
    """
    recipe = run.protocol
    fields: dict[str, Any] = {
        "kind": "detection",
        "backbone": run.backbone,
        "patch_px": run.model_kwargs.get("patch_size", PROTOCOL_PATCH_PX),
        "protocol": Protocol(name=recipe.name, version=recipe.version, full=not changed, deviations=changed),
        "metrics": dict(metrics),
        "seed": run.seed,
        "wall_time_s": wall_time_s,
        **provenance(first_names({**run.settings(), **hashed})),
        **origin,
    }
    if begins:
        planned(run.output, **fields)
        return run.output / FILE_NAME
    return write_result(finished(**fields), run.output)
