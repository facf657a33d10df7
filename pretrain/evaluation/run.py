"""Dense evaluation of one checkpoint on one set, task by task: what is finished is kept, and leaves one
``result.json``.

``FOLDER/tasks/TASK.json`` holds a finished task with all that its numbers depend on, ``TASK.npz`` its maps
for figures.
"""

import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pretrain.data.class_folders import open_class_folders
from pretrain.data.datasets import LabelSet
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel
from pretrain.evaluation import Outcome
from pretrain.evaluation.classification import KnnSettings, knn_classification
from pretrain.evaluation.clustering import clustering
from pretrain.evaluation.features import Features
from pretrain.evaluation.in_context import in_context
from pretrain.evaluation.linear_segmentation import linear
from pretrain.evaluation.long_work import check_signals
from pretrain.evaluation.protocol import KNN, TASKS, deviations_of_data, name_of, protocol_of
from pretrain.progress import Progress
from pretrain.results.provenance import config_hash, file_hash, peak_memory_mib, provenance
from pretrain.results.schema import FILE_NAME, Result, read_result, write_result
from pretrain.settings import as_dict, compared
from pretrain.signals import StopSignals

Evaluator = Callable[..., Outcome]  # (features, train, val, settings, n_shown=0, signals=None)
EVALUATORS: Mapping[str, Evaluator] = {"linear": linear, "in_context": in_context, "clustering": clustering}
TASKS_FOLDER = "tasks"
KIND: Final = "dense"


@dataclass(frozen=True)
class Finished:
    """A task that was run: what it found, what it cost."""

    outcome: Outcome
    wall_time_s: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Job:
    """One checkpoint on one labeled set.

    Attributes:
        subject: the checkpoint.
        set_name: of the set, as the protocol is named after it.
        data: what else tells the set from others: the classes, and of each part its source, number of images
            and hash of names.
        settings: by task, of those to be run.
        evaluate: (task, features) -> what the task finds.
        others: (the protocol's, this run's) values of what no task sets.
        seed: of all tasks.
        val: the validation part, of a set with a label a pixel.
    """

    subject: EvalModel
    set_name: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    evaluate: Callable[[str, Features], Outcome]
    others: Mapping[str, tuple[Any, Any]]
    seed: int = 0
    val: LabelSet | None = None

    def config(self, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """All that the numbers of some tasks (none: of all) depend on, except the weights, of which it holds
        only how they were trained: one training with several seeds is one configuration. The result holds its
        hash.
        """
        subject = self.subject
        return {
            "set": self.set_name,
            "data": dict(self.data),
            "backbone": subject.backbone,
            "patch_px": subject.patch_px,
            "source": subject.source,
            "training": subject.training,
            **{name: pair[1] for name, pair in self.others.items()},
            "seed": self.seed,
            **{task: as_dict(used) for task, used in self.settings.items() if tasks is None or task in tasks},
        }


def job_on_set(
    subject: EvalModel,
    train: LabelSet,
    val: LabelSet,
    settings: Mapping[str, Any],
    others: Mapping[str, tuple[Any, Any]],
    signals: StopSignals,
    seed: int = 0,
    max_images: int = 0,
    n_shown: int = 0,
) -> Job:
    """The tasks on a set with a label a pixel.

    Args:
        train, val: parts of the set.
        others: (the protocol's, this run's) values of what belongs neither to the data nor to a task.
        max_images: of each part; 0: all.
        n_shown: images of the validation part that maps are kept of.
    """
    others = {**others, **deviations_of_data(train.name, (len(train), len(val)), max_images)}
    others |= {
        f"{part.part}_set": ("as published", part.departure) for part in (train, val) if part.departure
    }
    if max_images:
        train, val = train.first(max_images), val.first(max_images)
    data: dict[str, Any] = {"classes": list(train.classes)}
    for part in (train, val):
        names = _hash([Path(image).name for image, _ in part.files])
        data[part.part] = {"source": part.source, "images": len(part), "names": names}

    def evaluate(task: str, features: Features) -> Outcome:
        parts = watched(train, task, signals), watched(val, task, signals)
        return EVALUATORS[task](features, parts[0], parts[1], settings[task], n_shown, signals)

    return Job(subject, train.name, data, settings, evaluate, others, seed, val)


def job_on_classes(
    subject: EvalModel,
    root: Path,
    settings: KnnSettings,
    others: Mapping[str, tuple[Any, Any]],
    signals: StopSignals,
    seed: int = 0,
    max_images: int = 0,
) -> Job:
    """k-NN classification of a folder of classes; the arguments are those of :func:`job_on_set`."""
    train, val = open_class_folders(root)
    others = {**others, **deviations_of_data(KNN, (len(train), len(val)), max_images)}
    data = {
        part.folder.name: {"images": len(part), "names": _hash([name for _, name in part.files])}
        for part in (train, val)
    }
    data["classes"] = {"number": len(train.classes), "names": _hash(train.classes)}
    if max_images:
        train, val = train.first(max_images), val.first(max_images)

    def evaluate(task: str, features: Features) -> Outcome:
        return knn_classification(features, train, val, settings, signals)

    return Job(subject, KNN, data, {KNN: settings}, evaluate, others, seed)


def check_folder(job: Job, folder: Path, resume: bool) -> None:
    """Before anything is computed: whether an evaluation may write here.

    Raises:
        UserError: the folder holds another kind of run, or an evaluation that nothing says to go on with.
    """
    if (folder / FILE_NAME).is_file():
        before = read_result(folder)
        if (before.kind, before.protocol.name) != (KIND, name_of(job.set_name)):
            raise UserError(
                f"--output: {folder} holds a run of another kind, {before.protocol.name}; choose another folder"
            )
    if not resume and ((folder / FILE_NAME).is_file() or any((folder / TASKS_FOLDER).glob("*.json"))):
        raise UserError(
            f"--output: {folder} already holds an evaluation; go on with --resume, or choose another folder"
        )


def run(job: Job, features: Features, folder: Path, signals: StopSignals) -> dict[str, Finished]:
    """Run the tasks of a job that ``folder`` does not hold yet, one after the other.

    Args:
        features: of the job's backbone, frozen.

    Raises:
        UserError: bad data; or the folder holds a task of the same name with other settings or weights, by
            the names of these.
        Interrupted: there was a signal; the tasks finished so far are kept.
    """
    weights, before, finished = file_hash(job.subject.path), {}, {}
    for file in sorted(
        (folder / TASKS_FOLDER).glob("*.json")
    ):  # before the first hour: an error where one differs
        before[file.stem] = _read(file, _identity(job, file.stem, weights))
        asked = file.stem in job.settings
        print(f"{file.stem}: evaluated before" + ("" if asked else ", not asked for now"), flush=True)
    for task in job.settings:
        if task in before:
            finished[task] = before[task]
            continue
        check_signals(signals, task)
        started = time.perf_counter()
        outcome = job.evaluate(task, features)
        finished[task] = Finished(outcome, time.perf_counter() - started, peak_memory_mib())
        _leave(folder / TASKS_FOLDER / f"{task}.json", _identity(job, task, weights), finished[task])
        print(f"{task}: {numbers(outcome)}, {finished[task].wall_time_s:.0f} s", flush=True)
    return finished


def write(job: Job, finished: Mapping[str, Finished], folder: Path) -> Path:
    """``folder/result.json`` of a job whose tasks are all finished; wall time and memory are those of the
    tasks."""
    subject = job.subject
    origin = provenance(job.config(), subject.path)
    origin["peak_memory_mib"] = max(task.peak_memory_mib for task in finished.values())
    result = Result(
        kind=KIND,
        method=subject.method,
        backbone=subject.backbone,
        effective_epochs=subject.effective_epochs,
        protocol=protocol_of(job.set_name, job.settings, job.others),
        metrics={name: value for task in finished.values() for name, value in task.outcome.metrics.items()},
        labels=job.val.description if job.val else "",
        seed=job.seed,
        wall_time_s=sum(task.wall_time_s for task in finished.values()),
        **origin,
    )
    return write_result(result, folder)


def numbers(outcome: Outcome) -> str:
    """What a task found, on one line, without what it found of each class."""
    return ", ".join(
        f"{name} {value:.2f}" for name, value in outcome.metrics.items() if not isinstance(value, dict)
    )


class Watch:
    """Counts the images that a task reads of a part of a set and reports the progress. A signal stops the
    task."""

    def __init__(self, label: str, signals: StopSignals) -> None:
        self.label, self.signals = label, signals
        self.n_read, self.lock = 0, Lock()

    def __call__(self, total: int) -> None:
        """After each image, from any thread.

        Args:
            total: images that the task takes of the part; it may read them several times.

        Raises:
            Interrupted: there was a signal.
        """
        with self.lock:
            number, place = divmod(self.n_read, total)
            if place == 0:
                self.tell = Progress(f"{self.label}, pass {number + 1}", total)
            self.n_read += 1
            self.tell()
        check_signals(self.signals, self.label)


def watched(part: LabelSet, task: str, signals: StopSignals) -> LabelSet:
    """A part of a set, watched while a task reads it."""
    return replace(part, on_read=Watch(f"{task}, {part.part}", signals))


def _hash(names: Sequence[str]) -> str:
    return config_hash({"names": list(names)})


def _identity(job: Job, task: str, weights: str) -> dict[str, Any]:
    identity: dict[str, Any] = json.loads(json.dumps({**job.config([task]), "weights_hash": weights}))
    return identity


def _read(file: Path, identity: Mapping[str, Any]) -> Finished:
    """A task that was finished before.

    Raises:
        UserError: the file cannot be read, or the task was run with another identity; the settings of a task
            that is not asked for are no part of it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
            maps = {name: list(arrays[name]) for name in arrays.files}
        before = {key: value for key, value in content["of"].items() if key in identity or key not in TASKS}
        metrics: dict[str, Any] = content["metrics"]
        cost = float(content["wall_time_s"]), float(content["peak_memory_mib"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file}: no finished task can be read here ({type(error).__name__}: {error}); remove it"
        ) from error
    if changed := compared(before, identity):
        told = [_told(key, *changed[key]) for key in sorted(changed)]
        raise UserError(f"{file} is of another evaluation: {', '.join(told)}; choose another folder")
    return Finished(Outcome(metrics, maps), *cost)


def _leave(file: Path, identity: Mapping[str, Any], done: Finished) -> None:
    """The json is written last and in one step: where it exists, the task is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    maps: dict[str, NDArray[np.int32]] = {
        name: np.stack(some) for name, some in done.outcome.maps.items() if some
    }
    np.savez_compressed(file.with_suffix(".npz"), **maps)  # type: ignore[arg-type]
    cost = {"wall_time_s": done.wall_time_s, "peak_memory_mib": done.peak_memory_mib}
    content = {"of": identity, "metrics": done.outcome.metrics, **cost}
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _told(key: str, before: Any, now: Any) -> str:
    """A value that differs: short ones with both."""
    pair = f"{json.dumps(before)}, now {json.dumps(now)}"
    return f"{key} ({pair})" if len(pair) < 80 else key
