"""COCO evaluation that writes ``result.json``. It is part of the config, so stock launchers write it too."""

import json
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from det_plugin.coco.annotations import read_classes
from det_plugin.coco.layout import locate
from det_plugin.coco.metrics import KINDS, SUMMARY, Prediction, coco_metrics, in_words
from det_plugin.detectron2_engine import saved_config as saved
from det_plugin.detectron2_engine.catalog import coco_root, train_images
from det_plugin.detectron2_engine.lazy import config
from det_plugin.loader import batches
from det_plugin.loop import Show
from det_plugin.protocol import READING, deviations, other_images, protocol
from det_plugin.run import DetectionRun
from det_plugin.run import leave_result as left_result
from pretrain import distributed
from pretrain.build import network_kwargs
from pretrain.data import digest
from pretrain.files import write_text
from pretrain.log import log
from pretrain.settings import compared
from pretrain.weights import origin_of

PREDICTIONS = "coco_instances_results.json"
NAMES = dict(zip(SUMMARY, ("AP", "AP50", "AP75", "APs", "APm", "APl")))  # ours, and Detectron2's
# Keys of a config that are no part of its recipe.
NO_RECIPE = (*saved.SURROUNDINGS, "train.seed", "dataloader.evaluator.")


class ResultEvaluator(DatasetEvaluator):
    """Box AP, and with masks mask AP, of the validation split, as the torchvision engine computes it.

    In training, only the evaluation after the last iteration writes ``result.json``. ``--eval-only`` writes
    it for the checkpoint that it was given. The wall time is the process's; in our loop it is the whole
    run's, however often it was interrupted. Every evaluation writes its detections to
    ``coco_instances_results.json``.

    Args:
        root: data of any layout; None: ``$DETECTRON2_DATASETS/coco``.
        output_dir: run folder. The launcher wrote ``config.yaml`` there.
        protocol, version, overrides: what the config was made from (:func:`saved_config.protocol_in`).
        accumulate: micro-batches a step. It is only recorded.
        origin, classes: of a resolved config: what the backbone's file said; category id -> name.

    Raises:
        UserError: a file of the data is missing or damaged; names it.
    """

    def __init__(
        self,
        root: str | None,
        output_dir: str,
        *,
        protocol: str,
        overrides: Mapping[str, Any],
        version: int = 1,
        accumulate: int = 1,
        origin: Mapping[str, Any] | None = None,
        classes: Mapping[int, str] | None = None,
    ) -> None:
        self.reading = {key: overrides[key] for key in READING if key in overrides}
        where = coco_root(root), "val", self.reading.get("val_share", 0.0)
        self.files, self.folder = locate(*where), Path(output_dir)
        self.category_ids = list(read_classes(*where))
        self.found: list[Prediction] = []
        self.metrics: dict[str, Any] = {}  # of the last evaluation, by our names

    def reset(self) -> None:
        """Forget the detections."""
        self.found = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the detections of some images."""
        for image, output in zip(inputs, outputs):
            for own in instances_to_coco_json(output["instances"].to("cpu"), image["image_id"]):
                self.found.append({**own, "category_id": self.category_ids[own["category_id"]]})

    def evaluate(self) -> dict[str, Any]:
        """Detectron2's results, ``{"bbox": {"AP": ...}, "segm": ...}`` or ``bbox`` alone; {} on all ranks but
        the first."""
        found = [prediction for part in comm.gather(self.found) for prediction in part]
        if not comm.is_main_process():
            return {}
        write_text(self.folder / PREDICTIONS, json.dumps(found) + "\n")
        how = {key: value for key, value in self.reading.items() if key in ("crowds", "masks")}
        metrics = self.metrics = coco_metrics(self.files, found, **how)
        cfg = saved.load_config(self.folder, saved.ASKED, trust=True)  # the launcher has just written it
        if has_event_storage():
            LazyConfig.save(saved.resolved(cfg), str(self.folder / saved.RESOLVED))
        if not has_event_storage() or get_event_storage().iter >= cfg.train.max_iter:
            share = cfg.dataloader.train.dataset.get("share", 1.0)
            trained_on = train_images(
                cfg.dataloader.root, cfg.model.roi_heads.num_classes, share, **self.reading
            )
            images = trained_on, len(self.files.read()["images"])
            leave_result(cfg, metrics, images, self.folder)
        log(in_words(metrics))
        kinds = {kind: task for kind, task in KINDS.items() if f"{kind}_ap_classes" in metrics}
        results: dict[str, Any] = {task: {} for task in kinds.values()}
        for (kind, task), (name, key) in product(kinds.items(), NAMES.items()):
            if f"{kind}_{name}" in metrics:
                results[task][key] = metrics[f"{kind}_{name}"]
        return results


def config_deviations(cfg: DictConfig) -> dict[str, list[Any]]:
    """``{key: [the protocol's value, the run's]}``, by fields of the protocol and keys of the config.

    Args:
        cfg: a whole config as :func:`det_plugin.detectron2_engine.lazy.config` makes it, perhaps edited.
    """
    made_from, net = saved.protocol_in(cfg), cfg.model.backbone.net
    model_kwargs = {key: value for key, value in net.items() if key not in saved.NET_KEYS}
    changed = deviations(made_from, net.name)
    if given := network_kwargs(saved.model_kwargs_in(cfg)):
        changed["model_kwargs"] = [{}, given]
    expected = config(made_from, net.name, model_kwargs=model_kwargs)
    different = compared(saved.plain(expected), saved.plain(cfg))
    return changed | {key: different[key] for key in sorted(different) if not key.startswith(NO_RECIPE)}


def leave_result(
    cfg: DictConfig,
    metrics: Mapping[str, Any],
    images: tuple[int | None, int],
    folder: Path,
    begins: bool = False,
) -> Path:
    """Write the ``result.json`` of the run that trained what ``cfg`` evaluates.

    Args:
        cfg: the config of this process: a training that is over, or an evaluation of
            ``train.init_checkpoint``.
        begins: at the start of a training, see :func:`det_plugin.run.leave_result`.
        images: number of images for training (none: not known) and evaluation.
    """
    # The launcher's first act; the clock may have been set since
    since = 0.0 if begins else time.time() - (folder / saved.ASKED).stat().st_mtime
    changed, trained = config_deviations(cfg), cfg
    if not has_event_storage():
        trained, unlike = _training_of(cfg)
        changed = {**config_deviations(trained), **changed, **unlike}
    elif cfg.train.init_checkpoint:
        changed["init_checkpoint"] = ["", Path(cfg.train.init_checkpoint).name]
    recipe, origin = saved.protocol_in(trained), saved.origin_in(trained) or origin_of(None)
    changed |= {**other_images(*images, recipe.train_share), **digest.run_deviation(folder)}
    return left_result(
        DetectionRun(
            backbone=trained.model.backbone.net.name,
            weights=None,
            data=coco_root(cfg.dataloader.root),
            output=folder,
            protocol=recipe,
            seed=trained.train.seed,
            model_kwargs=saved.model_kwargs_in(trained),
        ),
        metrics,
        changed,
        origin={key: value for key, value in origin.items() if key != "model_kwargs"},
        wall_time_s=max(since, 0.0),
        begins=begins,
        hashed={"engine": "detectron2", "deviations": changed},
    )


def _training_of(cfg: DictConfig) -> tuple[DictConfig, dict[str, list[Any]]]:
    """The config that trained ``train.init_checkpoint``, and the deviations that the checkpoint shows."""
    planned = protocol(cfg.dataloader.evaluator.protocol, cfg.model.backbone.net.name).max_iters
    if not cfg.train.init_checkpoint:
        return cfg, {"max_iters": [planned, 0]}
    checkpoint = Path(cfg.train.init_checkpoint)
    if not (checkpoint.parent / saved.RESOLVED).is_file():
        return cfg, {
            "training": ["as the protocol says", f"unknown: no {saved.RESOLVED} beside {checkpoint.name}"]
        }
    trained = saved.load_config(checkpoint.parent, saved.RESOLVED)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    done = state.get("iteration", -1) + 1
    return trained, {} if done == trained.train.max_iter else {"max_iters": [planned, done]}


class TestBatches:
    """Detectron2's test loader, with workers that ignore group signals and whose errors are one line."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.show: Show | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Any]]:
        loader: Any = self.loader
        made = batches(loader.dataset, loader.batch_sampler, loader.num_workers, torch.device("cpu"))
        started = time.monotonic()
        for number, batch in enumerate(made, 1):
            yield batch  # and is back when it has gone through the network
            if self.show is not None:
                share = number / len(self)
                self.show(share, (time.monotonic() - started) * (1 / share - 1))


def evaluate(cfg: DictConfig, model: nn.Module, show: Show | None = None) -> dict[str, Any]:
    """Run the config's evaluator on its test loader; COCO's metrics, {} on all ranks but the first.

    Args:
        show: is told how far it is.

    Raises:
        UserError: an image cannot be used, also where a worker process meets it.
    """
    data, evaluator = TestBatches(instantiate(cfg.dataloader.test)), instantiate(cfg.dataloader.evaluator)
    data.show = show
    inference_on_dataset(model, data, evaluator)
    distributed.barrier()  # of the hosts: in Detectron2's own barrier, NCCL would give up after ten minutes
    return evaluator.metrics  # type: ignore[no-any-return]
