"""Protocols of dense evaluation: the tasks, the settings of each, and the deviations of a run from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.errors import UserError
from pretrain.evaluation.classification import KnnSettings
from pretrain.evaluation.clustering import ClusteringSettings
from pretrain.evaluation.in_context import InContextSettings
from pretrain.evaluation.linear_segmentation import LinearSettings
from pretrain.results.schema import Protocol
from pretrain.settings import Settings, build, differences, read_words, replaced, split_words

VERSION = 1
KNN = "knn"  # on a labeled folder; all others are on a set with a label a pixel


class DenseSettings(Settings):
    """The settings of every task; a field is a task's name."""

    linear: LinearSettings = LinearSettings()
    in_context: InContextSettings = InContextSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    knn: KnnSettings = KnnSettings()


TASKS = tuple(DenseSettings.model_fields)
DENSE_TASKS = tuple(name for name in TASKS if name != KNN)
# Training and validation images of the public protocols. Other sets have no such number.
N_IMAGES = {
    "voc2012": (10_582, 1_449),  # "trainaug": with the masks of SBD
    "ade20k": (20_210, 2_000),
    "coco_things": (118_287, 5_000),  # of which the linear layer sees a tenth: linear.coco_images
    "coco_stuff": (118_287, 5_000),
    KNN: (1_281_167, 50_000),  # ImageNet-1K
}
SEED = "seed"  # a field of some settings; another seed is the same protocol
NO_DEVIATION = (SEED, "map_px")  # and so is another size of the figures


def named_tasks(words: Iterable[str], what: str) -> tuple[str, ...]:
    """Tasks on a set with pixel labels, in the order of :data:`DENSE_TASKS`.

    Args:
        what: where the words stand, for messages.

    Raises:
        UserError: a word that names none.
    """
    words = list(words)
    for word in words:
        if word not in DENSE_TASKS:
            raise UserError(f"{what}: {word!r} is none of {', '.join(DENSE_TASKS)}")
    return tuple(task for task in DENSE_TASKS if task in words)


def settings_of(tasks: Sequence[str], words: Sequence[str] = (), seed: int = 0) -> dict[str, Any]:
    """The settings of some tasks, by their names.

    Args:
        words: ``TASK.FIELD=VALUE``, changes of the defaults.
        seed: of everything that a task draws.

    Raises:
        UserError: an unknown task or field, a value of another type or out of range, a change of a task that
            is not among ``tasks``.
    """
    for key, value in split_words(words).items():
        task, dot, field = key.partition(".")
        if not dot or task not in TASKS:
            raise UserError(f"{key}={value}: should be TASK.FIELD=VALUE, TASK one of {', '.join(TASKS)}")
        if field == SEED:
            raise UserError(f"{key}={value}: give it as --seed, which all tasks share")
        if task not in tasks:
            raise UserError(f"{key}={value} has no effect: {task} is not asked for")
    settings = build(DenseSettings, [read_words(words)], "settings")
    return {task: seeded(getattr(settings, task), seed) for task in tasks}


def seeded(settings: Any, seed: int) -> Any:
    """The same settings with this seed, where they have one."""
    return replaced(settings, {SEED: seed}) if hasattr(settings, SEED) else settings


def deviations_of_data(
    set_name: str, n_images: tuple[int, int], max_images: int
) -> dict[str, tuple[Any, Any]]:
    """(The protocol's, the run's) numbers of images.

    Args:
        set_name: one of :data:`N_IMAGES`, or any other, of which there is no public number.
        n_images: that the training and the validation part hold.
        max_images: that are used of each; 0: all.
    """
    expected = N_IMAGES.get(set_name, n_images)
    parts = zip(("train", "val"), zip(expected, n_images))
    pairs: dict[str, tuple[Any, Any]] = {f"{part}_images": pair for part, pair in parts}
    return pairs | {"max_images": ("all", max_images if 0 < max_images < max(n_images) else "all")}


def name_of(set_name: str) -> str:
    """Of the protocol of a set."""
    return f"dense-{set_name}"


def protocol_of(set_name: str, settings: Mapping[str, Any], others: Mapping[str, Sequence[Any]]) -> Protocol:
    """Protocol ``dense-SET``, and every deviation from it. A task that was left out is none: it has no
    metric.

    Args:
        set_name: of the labeled set, :data:`KNN` for the labeled folder.
        settings: by task, of those that were run.
        others: (the protocol's, the run's) values of all that no task sets.
    """
    changed: dict[str, list[Any]] = {name: list(pair) for name, pair in others.items() if pair[0] != pair[1]}
    for task, used in settings.items():
        pairs = differences(type(used)(), used)
        changed |= {f"{task}.{field}": pair for field, pair in pairs.items() if field not in NO_DEVIATION}
    return Protocol(name=name_of(set_name), version=VERSION, full=not changed, deviations=changed)
