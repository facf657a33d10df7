"""The data sets: which set and protocol each name stands for, and how MMSegmentation reads them.

Images are read by :mod:`pretrain.data.decode`, labels by :mod:`pretrain.data.datasets`, as everywhere. An error names
the file.
"""

import os
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations, PhotoMetricDistortion
from mmseg.registry import DATASETS as REGISTRY
from mmseg.registry import TRANSFORMS
from mmseg.utils import get_palette

from pretrain.data.broken import UnreadableImage, check_share, read_or_other
from pretrain.data.datasets import LabelSet, MaskRule, kind_of, open_label_set, open_label_sets
from pretrain.data.datasets.public import ade_home
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.images import cut_off
from pretrain.data.sources.files import read_file
from pretrain.errors import UserError
from pretrain.schedules import iterations
from pretrain.settings import above_zero, replaced
from seg_plugin.loop import DrawnIndex
from seg_plugin.plan import schedule, whole_schedule
from seg_plugin.protocol import OF_THE_DATA, OWN, SegmentationProtocol, protocol, with_overrides

PARTS = {"training": "train", "validation": "val"}  # the protocol's words, the data sets'


class Dataset(NamedTuple):
    """A data set: the name of its protocol, and its kind (:func:`pretrain.data.datasets.kinds`)."""

    protocol: str
    kind: str
    counts: tuple[int, int] | None = None  # images of training and validation, where they are known


# Counts are from MMSegmentation's configs and the data sets' own descriptions. A module that POSFIELD_IMPORT names adds
# its own here, and its protocol to PROTOCOLS.
DATASETS = {
    "ade20k": Dataset("ade20k-160k", "ade20k", (20_210, 2_000)),
    "voc": Dataset("voc2012-40k", "voc2012_train", (1_464, 1_449)),
    "voc_aug": Dataset("voc2012aug-40k", "voc2012", (10_582, 1_449)),
    "cityscapes": Dataset("cityscapes-80k", "cityscapes", (2_975, 500)),
    "own": Dataset(OWN, "folder"),
}
_BY_KIND = {"ade20k": "ade20k", "voc2012": "voc", "cityscapes": "cityscapes", "folder": "own"}


def dataset_of(recipe: SegmentationProtocol) -> Dataset:
    """The data set of a protocol."""
    return next(dataset for dataset in DATASETS.values() if dataset.protocol == recipe.name)


def recipe_for(
    folder: str | Path, name: str | None, overrides: Mapping[str, Any], masks: MaskRule | None = None
) -> SegmentationProtocol:
    """The protocol of a data set, with some fields changed.

    Args:
        folder: of the data set.
        name: a key of :data:`DATASETS`; None: what the folder looks like.
        overrides: field -> value, or its text. ``epochs``, or ``max_iters`` without ``val_every``, sets the whole schedule
            in the protocol's proportions.
        masks: how masks of your own data are read; all of them are, once, to find out or check the classes.

    Raises:
        UserError: an unknown name or field, as :func:`pretrain.data.datasets.open_label_sets`.
    """
    known, epochs = ", ".join(DATASETS), overrides.get("epochs")
    overrides = {key: value for key, value in overrides.items() if key != "epochs"}
    if epochs is not None and "max_iters" in overrides:
        said = f"epochs={epochs} and max_iters={overrides['max_iters']}"
        raise UserError(f"protocol: {said} say it twice; give one of them")
    if name is None:
        kind = kind_of(folder)
        if kind not in _BY_KIND:
            raise UserError(
                f"data: {folder} holds {kind}, which has no protocol; --dataset is one of {known}"
            )
        name = _BY_KIND[kind]
    if name not in DATASETS:
        raise UserError(f"dataset: {name!r} is none of {known}")
    base = protocol(DATASETS[name].protocol)
    overrides = whole_schedule(base, overrides)
    if name != "own":
        recipe = with_overrides(base, overrides)
        if epochs is None:
            return recipe
        train = label_set(section(recipe, folder, "train", (), masks))
    else:
        recipe = with_overrides(base, {"num_classes": "2", **overrides})  # any: it is known below
        n_classes = recipe.num_classes if "num_classes" in overrides else 0
        train, _ = open_label_sets(folder, "folder", n_classes, rule_of(recipe, masks))
        recipe = with_overrides(recipe, {"num_classes": len(train.classes)})
    if epochs is None:
        return recipe
    max_iters = iterations(above_zero("epochs", epochs), len(train.files), recipe.batch_size)
    return with_overrides(recipe, schedule(base, max_iters, overrides))


def rule_of(recipe: SegmentationProtocol, masks: MaskRule | None = None) -> MaskRule:
    """How masks are read that a protocol says something of: what is not counted, if nothing else says it."""
    masks = masks or MaskRule()
    is_default = not recipe.reduce_zero_label and recipe.ignore_index == 255
    void = ("0",) * recipe.reduce_zero_label + (str(recipe.ignore_index),)
    return masks if masks.void or is_default else masks.model_copy(update={"void": void})


def section(
    recipe: SegmentationProtocol, root: str | Path, part: str, pipeline: Any, masks: MaskRule | None = None
) -> dict[str, Any]:
    """A data set in MMSegmentation's config: :class:`PosfieldLabels`.

    ADE20K's folders with another number of classes, or with label 0 as one, are read as masks of one's own.

    Raises:
        UserError: another set has another number of classes than the protocol says.
    """
    kind, full, home = dataset_of(recipe).kind, protocol(recipe.name), str(root)
    same = all(getattr(recipe, key) == getattr(full, key) for key in OF_THE_DATA)
    if kind == "ade20k" and not same:
        kind, home = "folder", str(ade_home(Path(root)))
    elif kind != "folder" and not same:
        told = ", ".join(f"{key}={getattr(recipe, key)}" for key in OF_THE_DATA)
        raise UserError(
            f"protocol: {told} are not those of {recipe.name}; for other masks give --dataset own"
        )
    rule = rule_of(recipe, masks).model_dump(exclude_defaults=True) if kind == "folder" else {}
    return dict(
        type="PosfieldLabels", data_root=home, part=part, kind=kind, n_classes=recipe.num_classes, masks=rule,
        reduce_zero_label=recipe.reduce_zero_label, ignore_index=recipe.ignore_index, pipeline=pipeline,
    )  # fmt: skip


def label_set(values: Mapping[str, Any]) -> LabelSet:
    """The set of a :func:`section`; errors are :func:`pretrain.data.datasets.open_label_set`'s."""
    root, rule = values["data_root"], replaced(MaskRule(), values["masks"] or {}, "masks")
    found = open_label_set(root, values["part"], values["kind"], values["n_classes"], rule)
    if values["kind"] == "voc2012" and found.departure:
        raise UserError(f"data: {root} has no trainaug.txt and SegmentationClassAug, for voc_aug")
    return found


def in_words(parts: Sequence[LabelSet]) -> str:
    """One line: where the images of each part lie, how many there are, and who names the classes."""
    told = [f"{part.part} {part.folder} ({len(part)} pairs)" for part in parts]
    told += [f"divided by --val-share {part.val_share:g}" for part in parts[-1:] if part.val_share]
    return f"{', '.join(told)}; {parts[0].description}"


def check_parts(train: LabelSet, validation: LabelSet) -> None:
    """What a run would meet only after hours: all of the validation part, and images that are cut off. A bad training
    mask it meets in the first epoch.

    Raises:
        UserError: as :meth:`pretrain.data.datasets.LabelSet.check`; too many training images cannot be read.
    """
    validation.check()
    images = [Path(image) for image, _ in train.files]
    check_share(cut_off(images), len(images))


@REGISTRY.register_module()
class PosfieldLabels(BaseSegDataset):
    """A part of a labeled set (:class:`pretrain.data.datasets.LabelSet`) as MMSegmentation's data set: class k of the
    network is label k + 1 of the set, and what does not count is ``ignore_index``."""

    def __init__(
        self, data_root: str, part: str, kind: str, n_classes: int, masks: Any = None, **options: Any
    ) -> None:
        self.labels = label_set(
            dict(data_root=data_root, part=part, kind=kind, n_classes=n_classes, masks=masks)
        )
        known = kind.partition("2012")[0]
        palette = get_palette(known) if known in ("ade20k", "voc", "cityscapes") else []
        metainfo = {"classes": self.labels.classes, "palette": palette, "values": self.labels.values}
        # With data_root it would join both
        prefix = {"img_path": self.labels.folder, "seg_map_path": ""}
        super().__init__(data_prefix=prefix, metainfo=metainfo, **options)
        self.data_root = data_root

    def load_data_list(self) -> list[dict[str, Any]]:
        """One entry an image, in the set's order."""
        common = {"label_map": None, "reduce_zero_label": self.reduce_zero_label}
        files = (dict(zip(("img_path", "seg_map_path"), pair)) for pair in self.labels.files)
        return [{**pair, **common, "seg_fields": []} for pair in files]

    def prepare_data(self, index: int) -> Any:
        """A sample; in training that of another image, if it is broken, which the sample's ``broken`` then names.
        Which one depends on (seed, position) alone."""
        if self.test_mode or not isinstance(index, DrawnIndex):
            return self._sample(index)
        seed, position = index.seed, index.position

        def drawn(other: int) -> Any:
            return self._sample(DrawnIndex(other, seed, position))

        draws = partial(np.random.default_rng, [seed, position])
        sample, broken = read_or_other(int(index), len(self), drawn, draws)
        if broken:
            sample["data_samples"].set_metainfo({"broken": broken})
        return sample

    def _sample(self, index: int) -> Any:
        """The pipeline also gets the set and the number of what is ignored."""
        info = self.get_data_info(index)
        return self.pipeline({**info, "label_set": self.labels, "ignore_index": self.ignore_index})


@TRANSFORMS.register_module()
class SeedFromPosition(BaseTransform):
    """First of a training pipeline: what the next transforms draw only depends on (seed, position in the run),
    for any number of data-loading and training processes, and in a resumed run.

    It seeds ``random`` and ``numpy.random``; mmcv's and MMSegmentation's transforms draw from nothing else. It does
    nothing without :class:`seg_plugin.loop.PosfieldSampler`, or if a wrapper of the data set has changed the index.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Reads ``sample_idx``, changes nothing."""
        drawn = results.get("sample_idx")
        if isinstance(drawn, DrawnIndex):
            word = int(np.random.SeedSequence((drawn.seed, drawn.position)).generate_state(1)[0])
            random.seed(word)
            np.random.seed(word)
        return results


@TRANSFORMS.register_module()
class PosfieldLoadImage(LoadImageFromFile):
    """In place of mmcv's ``LoadImageFromFile``: 8-bit BGR as :mod:`pretrain.data.decode` reads images everywhere,
    turned by the EXIF orientation. Masks have none, and must be stored turned. An error names the file."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Adds ``img`` [H, W, 3], ``img_shape``, ``ori_shape``."""
        try:
            pixels = decode(read_file(os.fsencode(results["img_path"])))[..., ::-1]
        except BrokenImage as error:
            raise UnreadableImage(f"data: {results['img_path']} is no readable image ({error})") from error
        results["img"] = np.ascontiguousarray(pixels, np.float32 if self.to_float32 else np.uint8)
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


@TRANSFORMS.register_module()
class PosfieldLoadLabels(LoadAnnotations):
    """The labels of a :class:`PosfieldLabels`; in configs of earlier versions, without it, MMSegmentation's."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds ``gt_seg_map`` [H, W] uint8; nothing where there is no mask."""
        path, known, shape = results.get("seg_map_path"), results.get("label_set"), results["ori_shape"]
        if path is None or known is None:
            return results if path is None else super().transform(results)  # type: ignore[no-any-return]
        labels = known.read_labels(Path(path))
        if labels.shape != shape:
            raise UserError(f"data: {path} is {labels.shape}, but its image is {shape} (height, width)")
        results["gt_seg_map"] = np.where(labels == 0, results["ignore_index"], labels - 1).astype(np.uint8)
        results["seg_fields"].append("gt_seg_map")
        return results


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """In configs of earlier versions: whether the labels are classes."""

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Changes nothing."""
        labels = results["gt_seg_map"]
        if (bad := labels[(labels >= self.num_classes) & (labels != self.ignore_index)]).size:
            told = f"class {bad.min()}, but there are {self.num_classes}"
            raise UserError(f"data: {results['seg_map_path']} holds {told}")
        return results


@TRANSFORMS.register_module()
class PosfieldDistortion(PhotoMetricDistortion):
    """MMSegmentation's ``PhotoMetricDistortion``, which fails at ``hue_delta=0``: the hue then stays as it is."""

    def hue(self, img: np.ndarray) -> np.ndarray:
        """[H, W, 3] uint8 BGR."""
        return super().hue(img) if self.hue_delta else img  # type: ignore[no-any-return]
