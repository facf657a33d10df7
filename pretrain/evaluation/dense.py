"""Dense evaluation of one checkpoint on one set, task by task: the protocols and a run's deviations from them;
what is finished is kept, and leaves one ``result.json``.

``FOLDER/tasks/TASK.json`` holds a finished task with all that its numbers depend on, ``TASK.npz`` its maps
for figures.
"""

import contextlib
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from pretrain.data.class_folders import ClassFolder
from pretrain.data.datasets import LabelSet
from pretrain.data.images import n_shared
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel, UsedSettings
from pretrain.evaluation import Outcome, check_signals
from pretrain.evaluation.clustering import ClusteringSettings, clustering
from pretrain.evaluation.features import Features
from pretrain.evaluation.in_context import InContextSettings, in_context
from pretrain.evaluation.knn import KnnSettings, knn_classification
from pretrain.evaluation.linear_segmentation import LinearSettings, linear
from pretrain.files import read_mapping, replacing, write_json
from pretrain.log import Progress
from pretrain.results.provenance import config_hash, file_hash, peak_memory_mib
from pretrain.results.schema import FILE_NAME, Protocol, read_result
from pretrain.settings import (
    Settings,
    as_dict,
    build,
    compared,
    differences,
    read_words,
    replaced,
    split_words,
)
from pretrain.signals import StopSignals

VERSION = 1
KNN = "knn"  # on a labeled folder; all others are on a set with a label a pixel
TASKS_FOLDER = "tasks"
KIND: Final = "dense"
SEED = "seed"  # a field of some settings; another seed is the same protocol
NO_DEVIATION = (SEED, "map_px")  # and so is another size of the figures

Part = LabelSet | ClassFolder
Evaluator = Callable[..., Outcome]  # (features, train, val, settings, n_shown=0, signals=None)
EVALUATORS: dict[str, Evaluator] = {
    "linear": linear,
    "in_context": in_context,
    "clustering": clustering,
    KNN: knn_classification,
}


class DenseSettings(Settings):
    """The settings of every task; a field is a task's name."""

    linear: LinearSettings = LinearSettings()
    in_context: InContextSettings = InContextSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    knn: KnnSettings = KnnSettings()


DIGEST = "digest"  # of the parts, in a finished task
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


def named_tasks(words: Iterable[str], what: str) -> tuple[str, ...]:
    """Tasks on a set with pixel labels, in the order of :data:`DENSE_TASKS`. A UserError for a word that is
    none, with ``what``: where the words stand."""
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
    found = {task: getattr(settings, task) for task in tasks}
    return {t: replaced(used, {SEED: seed}) if hasattr(used, SEED) else used for t, used in found.items()}


def deviations_of_data(set_name: str, n_images: tuple[int, int], max_images: int) -> UsedSettings:
    """(The protocol's, the run's) numbers of images.

    Args:
        set_name: of :data:`N_IMAGES`; of any other set there is no public number.
        n_images: that the training and the validation part hold.
        max_images: that are used of each; 0: all.
    """
    train, val = zip(N_IMAGES.get(set_name, n_images), n_images)
    used = max_images if 0 < max_images < max(n_images) else "all"
    return {"train_images": train, "val_images": val, "max_images": ("all", used)}


def protocol_of(set_name: str, settings: Mapping[str, Any], others: Mapping[str, Sequence[Any]]) -> Protocol:
    """Protocol ``dense-SET``, and every deviation from it; the arguments are those of :class:`Job`. A task
    that was left out is none: it has no metric."""
    changed: dict[str, list[Any]] = {name: list(pair) for name, pair in others.items() if pair[0] != pair[1]}
    for task, used in settings.items():
        pairs = differences(type(used)(), used)
        changed |= {f"{task}.{field}": pair for field, pair in pairs.items() if field not in NO_DEVIATION}
    return Protocol(name=f"{KIND}-{set_name}", version=VERSION, full=not changed, deviations=changed)


@dataclass(frozen=True)
class Job:
    """One checkpoint on one labeled set.

    Attributes:
        set_name: of the set, as the protocol is named after it.
        parts: for training and validation, of a set with a label a pixel or a folder of classes.
        data: what else tells the set from others: the classes, and of each part its source, number of images
            and hash of names.
        settings: by task, of those to be run.
        others: (the protocol's, this run's) values of what no task sets.
        seed: of all tasks.
        n_shown: images of the validation part that maps are kept of.
    """

    subject: EvalModel
    set_name: str
    parts: Sequence[Part]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    others: UsedSettings
    seed: int = 0
    n_shown: int = 0

    def config(self, *tasks: str) -> dict[str, Any]:
        """All that the numbers of some tasks depend on, except the weights, of which it holds only how they
        were trained: one training with several seeds is one configuration."""
        of_subject = ("backbone", "patch_px", "source", "training")
        return {
            "set": self.set_name,
            "data": dict(self.data),
            **{name: getattr(self.subject, name) for name in of_subject},
            **{name: pair[1] for name, pair in self.others.items()},
            SEED: self.seed,
            **{task: as_dict(used) for task, used in self.settings.items() if task in tasks},
        }

    def evaluate(self, task: str, features: Features, signals: StopSignals) -> Outcome:
        """What a task finds, at what cost. The images that it reads are counted; a signal stops it."""
        started = time.perf_counter()
        train, val = (watched(part, task, signals) for part in self.parts)
        found = EVALUATORS[task](features, train, val, self.settings[task], self.n_shown, signals)
        wall_time_s = time.perf_counter() - started
        return replace(found, wall_time_s=wall_time_s, peak_memory_mib=peak_memory_mib())


def job_of(
    subject: EvalModel,
    parts: Sequence[Part],
    settings: Mapping[str, Any],
    others: UsedSettings,
    seed: int,
    max_images: int,
    n_shown: int = 0,
) -> Job:
    """The tasks on a set with a label a pixel, or k-NN on a folder of classes; the arguments are those of
    :class:`Job`, ``others`` without the data's, and at most ``max_images`` (0: all) of each part are used."""
    name = parts[0].name if isinstance(parts[0], LabelSet) else KNN
    others = {**others, **deviations_of_data(name, (len(parts[0]), len(parts[1])), max_images)}
    used = [part.first(max_images or len(part)) for part in parts]
    if shared := n_shared(*(part.named for part in used)):
        others["shared_images"] = (0, shared)
        told = f"{shared} of the {len(used[1])} validation images are training images, too"
        print(f"{name}: {told}: the numbers say less than they seem to", flush=True)
    data: dict[str, Any] = {}
    for whole, part in zip(parts, used):
        if isinstance(part, LabelSet):
            if part.departure:
                others[f"{part.part}_set"] = ("as published", part.departure)
            names = config_hash({"names": [Path(image).name for image, _ in part.files]})
            data[part.part] = {"source": part.source, "images": len(part), "names": names}
            data["classes"] = list(parts[0].classes)
        elif isinstance(whole, ClassFolder):
            names = config_hash({"names": [file for _, file in whole.files]})
            data[part.folder.name] = {"images": len(whole), "names": names}
            names = config_hash({"names": list(part.classes)})
            data["classes"] = {"number": len(part.classes), "names": names}
    return Job(subject, name, used, data, settings, others, seed, n_shown)


def check_folder(job: Job, folder: Path, resume: bool) -> None:
    """Before anything is computed: a UserError if the folder holds another kind of run, or an evaluation that
    nothing says to go on with."""
    if has_result := (folder / FILE_NAME).is_file():
        before = read_result(folder)
        if (before.kind, before.protocol.name) != (KIND, f"{KIND}-{job.set_name}"):
            kind = f"holds a run of another kind, {before.protocol.name}"
            raise UserError(f"--output: {folder} {kind}; choose another folder")
    if not resume and (has_result or any((folder / TASKS_FOLDER).glob("*.json"))):
        what = "already holds an evaluation; go on with --resume, or choose another folder"
        raise UserError(f"--output: {folder} {what}")


def run(job: Job, features: Features, folder: Path, signals: StopSignals) -> dict[str, Outcome]:
    """Run the tasks of a job that ``folder`` does not hold yet, one after the other.

    Raises:
        UserError: bad data; or the folder holds a task of the same name with other settings or weights, by
            the names of these.
        Interrupted: there was a signal; the tasks finished so far are kept.
    """
    # Read before the first hour: an error now where one differs
    files = sorted((folder / TASKS_FOLDER).glob("*.json"))
    weights = file_hash(job.subject.path, _weights_of(files))
    own = {"weights_hash": weights, DIGEST: {str(k): part.digest() for k, part in enumerate(job.parts)}}
    before = {file.stem: _read(file, _identity(job, file.stem, own)) for file in files}
    for task in before:
        print(f"{task}: evaluated before{'' if task in job.settings else ', not asked for now'}", flush=True)
    for task in [task for task in job.settings if task not in before]:
        check_signals(signals, task)
        done = before[task] = job.evaluate(task, features, signals)
        _leave(folder / TASKS_FOLDER / f"{task}.json", _identity(job, task, own), done)
        numbers = [f"{name} {value:.2f}" for name, value in done.metrics.items() if isinstance(value, float)]
        print(f"{task}: {', '.join(numbers)}{_over(done, job)}, {done.wall_time_s:.0f} s", flush=True)
    return {task: before[task] for task in job.settings}


def _over(done: Outcome, job: Job) -> str:
    """Of how many classes a mean is, where some do not occur in the validation part."""
    n_there, val = done.metrics.get("val_classes"), job.parts[-1]
    return "" if n_there in (None, len(val.classes)) else f" ({n_there} of {len(val.classes)} classes occur)"


def write(job: Job, finished: Mapping[str, Outcome], folder: Path) -> Path:
    """``folder/result.json`` of a job whose tasks are all finished; wall time and memory are those of the
    tasks."""
    part = job.parts[-1]
    metrics = {name: value for task in finished.values() for name, value in task.metrics.items()}
    metrics["images"] = len(part)
    folder_name = "" if isinstance(part, LabelSet) else part.folder.absolute().parent.name
    labels = (
        part.description if isinstance(part, LabelSet) else f"{len(part.classes)} classes of {folder_name}"
    )
    others: dict[str, Any] = {"labels": labels, "seed": job.seed}
    others["wall_time_s"] = sum(task.wall_time_s for task in finished.values())
    others["peak_memory_mib"] = max(task.peak_memory_mib for task in finished.values())
    protocol = protocol_of(job.set_name, job.settings, job.others)
    return job.subject.write_result(folder, KIND, protocol, job.config(*job.settings), metrics, **others)


def watched(part: Part, task: str, signals: StopSignals) -> Part:
    """A part of a set that counts the images which a task reads of it, several times maybe, and reports the
    progress; a signal stops it. k-NN reports its progress itself."""
    if isinstance(part, ClassFolder):
        return part
    label, lock, passes = f"{task}, {part.part}", Lock(), list[Progress]()

    def on_read(total: int) -> None:  # after each image, from any thread
        with lock:
            if not passes or passes[-1].done == total:
                passes.append(Progress(f"{label}, pass {len(passes) + 1}", total))
            passes[-1]()
        check_signals(signals, label)

    return replace(part, on_read=on_read)


def _identity(job: Job, task: str, own: Mapping[str, Any]) -> dict[str, Any]:
    identity: dict[str, Any] = json.loads(json.dumps({**job.config(task), **own}))
    return identity


def _weights_of(files: list[Path]) -> Any:
    """What the first of the finished tasks calls its weights; None where none says it."""
    with contextlib.suppress(UserError, AttributeError, IndexError):
        return read_mapping(files[0], "output").get("of", {}).get("weights_hash")
    return None


def _read(file: Path, identity: Mapping[str, Any]) -> Outcome:
    """A task that was finished before; a UserError if it cannot be read, or was run with another identity, of
    which the settings of a task that is not asked for are no part."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
            maps = {name: list(arrays[name]) for name in arrays.files}
        before = {key: value for key, value in content["of"].items() if key in identity or key not in TASKS}
        cost = float(content["wall_time_s"]), float(content["peak_memory_mib"])
        found = Outcome(dict(content["metrics"]), maps, *cost)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = f"no finished task can be read here ({type(error).__name__}: {error})"
        raise UserError(f"{file}: {reason}; remove it") from error
    # an earlier version kept none
    identity = {key: value for key, value in identity.items() if key != DIGEST or key in before}
    if changed := compared(before, identity):
        pairs = {key: f"{json.dumps(old)}, now {json.dumps(now)}" for key, (old, now) in changed.items()}
        told = [f"{key} ({pair})" if len(pair) < 80 else key for key, pair in sorted(pairs.items())]
        raise UserError(f"{file} is of another evaluation: {', '.join(told)}; choose another folder")
    return found


def _leave(file: Path, identity: Mapping[str, Any], done: Outcome) -> None:
    """The json is written last and in one step: where it exists, the task is complete."""
    maps: dict[str, Any] = {name: np.stack(some) for name, some in done.maps.items() if some}
    with replacing(file.with_suffix(".npz")) as partial, open(partial, "wb") as arrays:
        np.savez_compressed(arrays, **maps)
    cost = {"wall_time_s": done.wall_time_s, "peak_memory_mib": done.peak_memory_mib}
    write_json(file, {"of": identity, "metrics": done.metrics, **cost})
