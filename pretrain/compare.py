"""A comparison's runs: how the weights are converted, which runs there are, and the state of each.

:func:`prepare` converts every file of weights to our format, so that a run needs only its path. The runs of
:func:`plan` do not depend on each other.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pretrain.build import PROTOCOL_PATCH_PX
from pretrain.cli import REQUEUE_CODE
from pretrain.compare_config import NONE, SWEEP, Comparison, Entry, name_of, words_of
from pretrain.errors import UserError
from pretrain.export.converted import convert
from pretrain.files import write_text
from pretrain.jobs import (
    Processes,
    Stage,
    by_turns,
    gpu_prefixes,
    interruptible,
    recorded,
    recorded_code,
    run_jobs,
)
from pretrain.results.pages import page
from pretrain.results.paper import paper_tables
from pretrain.results.provenance import file_hash
from pretrain.results.render import render_all
from pretrain.results.schema import FILE_NAME, Result, read_result
from pretrain.results.tables import Line, Table
from pretrain.weights.write import FORMAT

# See :func:`state`.
DONE, RUNNING, OTHER, QUEUED, LEFT = "done", "running", "other settings", "in the queue", "left"
TABLES = {"csv": "csv", "tex": "latex", "html": "html", "md": "md"}  # {suffix: format}

# --- the weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """An entry's weights.

    Attributes:
        file: what the runs read: the entry's file, or what it was converted to.
        source: the file that the entry names.
        identity: what the runs depend on of it: ``key=value`` words.
    """

    file: Path
    source: Path
    identity: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hash of the file that the entry names."""
        return self.identity[0].removeprefix("weights=")

    def is_ready(self, note: Path) -> bool:
        """Whether the runs can begin; ``note``: that of the entry's file (:func:`note_of`)."""
        noted = note.is_file() and note.read_text() == shlex.join(self.identity)
        return self.file.is_file() and noted


def note_of(entry: Entry, output: Path) -> Path:
    """The file that says from what, and how, an entry's weights were made; finished runs need no more."""
    return output / "weights" / f"{name_of(entry)}.command"


def find_weights(comparison: Comparison, entry: Entry, output: Path) -> Weights | None:
    """Where an entry's weights are; None where its file is missing, and was missing the last time, too."""
    source, note = Path(comparison.weights) / entry.file, note_of(entry, output)
    asked = {key: value for key, value in _asked(entry).items() if value is not None}
    if os.access(source, os.R_OK):  # a file, or a folder of Hugging Face's
        digest = file_hash(source)
        is_ours = _metadata(source).get("format") == FORMAT and asked.keys() == {"method"}
    elif note.is_file():
        noted = shlex.split(note.read_text())
        digest, is_ours = noted[0].removeprefix("weights="), len(noted) == 2
    else:
        return None
    says = {"weights": digest, "backbone": entry.backbone, **({} if is_ours else asked)}
    identity = tuple(f"{key}={value}" for key, value in says.items())
    return Weights(source if is_ours else note.with_suffix(".safetensors"), source, identity)


def _asked(entry: Entry) -> dict[str, Any]:
    """What an entry says of its file: options of :func:`convert`."""
    return {
        key: getattr(entry, key) for key in ("source", "subnet", "patch_size", "method", "effective_epochs")
    }


def find_all(comparison: Comparison, output: Path) -> dict[str, Weights]:
    """:func:`find_weights` of every entry of which there are weights, by name."""
    found = {name_of(entry): find_weights(comparison, entry, output) for entry in comparison.entries}
    return {name: weights for name, weights in found.items() if weights is not None}


def prepare(entry: Entry, weights: Weights, output: Path) -> None:
    """Make the file that an entry's runs read, where it is not there yet.

    Raises:
        UserError: what is wrong with the file that the entry names.
    """
    note = note_of(entry, output)
    if weights.is_ready(note):
        return
    if weights.file != weights.source:
        convert(weights.source, weights.file, name=entry.backbone, **_asked(entry))
    elif (found := _metadata(weights.file).get("backbone", "no file")) != entry.backbone:
        raise UserError(f"weights: {weights.file}: {found}, not {entry.backbone}")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(shlex.join(weights.identity))


def prepare_all(weights: Mapping[str, Weights], entries: Sequence[Entry], output: Path) -> dict[str, str]:
    """:func:`prepare` for every entry, once; {name: why} of those that failed."""
    failed: dict[str, str] = {}
    for name, entry in {name_of(entry): entry for entry in entries}.items():
        try:
            prepare(entry, weights[name], output)
        except Exception as error:  # a foreign file may fail in any way; the other rows go on
            failed[name] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return failed


def _metadata(file: Path) -> dict[str, str]:
    """Of a safetensors file, without its tensors; of any other, none."""
    if file.suffix != ".safetensors" or not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError):  # the conversion will say what is wrong with it
        return {}


# --- the runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FineTuning:
    """One run of ``tools/train_{task}.py``, or its sweep.

    Attributes:
        task: ``det`` | ``seg``.
        arguments: of the tool, on any machine.
        identity: what its result depends on.
        is_sweep: whether it is the whole grid.
    """

    entry: Entry
    task: str
    folder: Path
    arguments: tuple[str, ...]
    identity: str
    is_sweep: bool = False

    @property
    def name(self) -> str:
        """``dino_vitb16/det_coco-12ep_seed0``."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def tool(self) -> str:
        """Name of its tool's file."""
        return f"train_{self.task}.py"

    def stage(self, tools: Path, n_gpus: int = 1) -> Stage:
        """Its command on so many GPUs of this machine: torchrun starts a process for each; a sweep, a run."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_gpus)]
        sweep = ["--sweep", "--jobs", str(n_gpus)]
        words = [str(tools / self.tool), *self.arguments]
        command = [*words, *sweep] if self.is_sweep else [*launcher * (n_gpus > 1), *words]
        return Stage(self.task, self.folder, [sys.executable, *command], self.identity)


def plan(
    comparison: Comparison, weights: Mapping[str, Weights], output: Path, n_gpus: int = 1
) -> list[FineTuning]:
    """The runs of all entries of which there are weights ({name: weights}). They go seed by seed, so that an
    unfinished comparison has every row; a sweep comes with the first seed."""
    runs: list[FineTuning] = []
    for seed in comparison.seeds:
        for task in (_detection, _segmentation):
            for entry in comparison.entries:
                if name_of(entry) in weights:
                    own = weights[name_of(entry)], output / name_of(entry)
                    runs += task(comparison, entry, *own, seed, n_gpus)
    return runs


def _detection(
    comparison: Comparison, entry: Entry, weights: Weights, folder: Path, seed: int, n_gpus: int
) -> list[FineTuning]:
    protocol = entry.detection or comparison.detection
    if protocol == NONE:
        return []
    accumulate = -(-comparison.accumulate // n_gpus)
    rest = [
        "--data",
        comparison.coco,
        "--accumulate",
        str(accumulate),
        *["--checkpointing"] * comparison.checkpointing,
        "--resume",
    ]
    recipe = ["--engine", comparison.engine, "--protocol", protocol, "--seed", str(seed)]
    overrides = words_of(comparison.detection_overrides)
    return [
        _run(
            comparison, entry, weights, "det", folder / f"det_{protocol}_seed{seed}", recipe, overrides, rest
        )
    ]


def _segmentation(
    comparison: Comparison, entry: Entry, weights: Weights, folder: Path, seed: int, n_gpus: int
) -> list[FineTuning]:
    kind = entry.segmentation or comparison.segmentation
    is_sweep = kind == SWEEP
    if kind == NONE or (is_sweep and seed != comparison.seeds[0]):
        return []
    folder = folder / ("seg_sweep" if is_sweep else f"seg_seed{seed}")
    rest = ["--data", comparison.ade, *["--resume"] * (not is_sweep)]
    overrides = words_of(comparison.segmentation_overrides)
    return [
        _run(
            comparison,
            entry,
            weights,
            "seg",
            folder,
            ["--dataset", "ade20k", "--seed", str(seed)],
            overrides,
            rest,
            is_sweep,
        )
    ]


def _run(
    comparison: Comparison,
    entry: Entry,
    weights: Weights,
    task: str,
    folder: Path,
    recipe: list[str],
    overrides: list[str],
    rest: list[str],
    is_sweep: bool = False,
) -> FineTuning:
    """Args: ``recipe`` and ``overrides`` are words on which the result depends, unlike on the ``rest``."""
    workers = [] if comparison.workers is None else ["--workers", str(comparison.workers)]
    shared = ["--weights", str(weights.file), "--output", str(folder), "--device", comparison.device]
    identity = shlex.join([f"train_{task}", *recipe, *["--sweep"] * is_sweep, *overrides, *weights.identity])
    return FineTuning(
        entry, task, folder, (*overrides, *recipe, *rest, *shared, *workers), identity, is_sweep
    )


def check_data(comparison: Comparison, runs: Sequence[FineTuning]) -> None:
    """Before anything is begun.

    Raises:
        UserError: no such folder of data, by its key.
    """
    for task, key in (("det", "coco"), ("seg", "ade")):
        if any(run.task == task for run in runs) and not Path(folder := getattr(comparison, key)).exists():
            raise UserError(f"{key}: there is no {folder}")


def run_all(
    runs: Sequence[FineTuning], tools: Path, n_at_once: int, n_gpus: int, seconds: float, device: str
) -> dict[str, str]:
    """Run them on this machine, ``n_at_once`` at a time on ``n_gpus`` GPUs each.

    Returns:
        {name: ``done`` | ``left`` | ``failed``}.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 came, and was passed on to what ran.
        UserError: there are not so many GPUs.
    """
    until = time.monotonic() + seconds
    gpus: list[list[str]] = [[]] * n_at_once if device == "cpu" else gpu_prefixes(n_at_once, n_gpus)
    stages, processes = {run.name: [run.stage(tools, n_gpus)] for run in runs}, Processes()
    for (stage,) in stages.values():
        stage.sign()
    with interruptible():
        launch = recorded(by_turns(processes.launch, gpus))
        return run_jobs(stages, n_at_once, until - time.monotonic(), launch, processes)


# --- states and results -----------------------------------------------------------------------------------


def state(stage: Stage) -> str:
    """``done`` | ``running`` | ``in the queue (job N)`` | ``other settings`` (another command began the
    folder) | ``failed (exit code N)`` | ``begun`` | ``left``."""
    if stage.is_done:
        return DONE
    code = recorded_code(stage.log)
    if code == RUNNING:
        return RUNNING
    if number := _queued(stage):
        return f"{QUEUED} (job {number})"
    if stage.is_of_another:
        return OTHER
    if code not in (None, REQUEUE_CODE):
        return f"failed (exit code {code})"
    return "begun" if stage.folder.exists() else LEFT


def is_to_begin(how: str) -> bool:
    """Whether to start or resume a run of this :func:`state`."""
    return how not in (DONE, RUNNING, OTHER) and not how.startswith(QUEUED)


def _queued(stage: Stage) -> str | None:
    """The number of the SLURM job that was to run it, while SLURM knows that job."""
    note = job_note(stage)
    if not note.is_file():
        return None
    number = note.read_text()
    try:
        asked = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True)
    except OSError:  # no SLURM here
        return None
    return number if asked.returncode == 0 and asked.stdout.strip() else None


def job_note(stage: Stage) -> Path:
    """The file that holds the number of the SLURM job to which a run was handed."""
    return stage.folder.with_suffix(".job")


def difference(stage: Stage) -> str:
    """In what the settings of a folder differ from those that are asked for, and what to do."""
    before, now = shlex.split(stage.signed or "unknown settings"), shlex.split(stage.identity)
    gone, new = [word for word in before if word not in now], [word for word in now if word not in before]
    told = f"it was begun with {shlex.join(gone) or 'less'}, asked for is {shlex.join(new) or 'less'}"
    return f"{stage.folder}: {told}; move it away, or give another --output"


def results(done: Sequence[FineTuning], weights: Mapping[str, Weights]) -> list[Result]:
    """The results of finished runs, under the comparison's names of the methods; and those of our own
    pre-trainings that lie beside the weights: they tell whether these were scaled down."""
    found = []
    for run in done:
        result, of_run = read_result(run.folder), weights[name_of(run.entry)]
        found.append(result.with_changes(method=run.entry.method))
        beside = of_run.source.with_name(FILE_NAME)
        before = read_result(beside) if beside.is_file() else None
        if before is not None and before.kind == "pretrain" and before.weights_hash == of_run.digest:
            # the run may have read a converted file
            found.append(before.with_changes(weights_hash=result.weights_hash))
    return found


def weights_table(done: Sequence[FineTuning], weights: Mapping[str, Weights]) -> Table:
    """Of which files the rows of these runs are, and how they were read."""
    lines = []
    for name, entry in {name_of(run.entry): run.entry for run in done}.items():
        metadata = _metadata(weights[name].file)
        model_kwargs, told = (json.loads(metadata.get(key, "{}")) for key in ("flags", "provenance"))
        patch = told.get("patch_size_before", model_kwargs.get("patch_size", PROTOCOL_PATCH_PX))
        read_as = " ".join(str(told[key]) for key in ("source", "subnet") if key in told) or "ours"
        who = (name, entry.method, entry.file)
        resampled = "" if patch == PROTOCOL_PATCH_PX else f", resampled to {PROTOCOL_PATCH_PX}"
        lines.append(
            Line("weights", False, (*who, weights[name].digest, read_as, f"{patch} px{resampled}")),
        )
    return Table(
        title="The files of weights",
        columns=("row", "method", "file", "hash", "read as", "patches"),
        groups=(tuple(lines),),
        notes=(),
        numeric=frozenset(),
        records=(),
    )


def write_tables(
    done: Sequence[FineTuning], weights: Mapping[str, Weights], tables: str, output: Path, name: str
) -> str:
    """Write ``NAME.md``, ``.csv``, ``.tex`` and ``.html``: the published tables with what was measured beside
    them, and the files of weights.

    Returns:
        the first of them.
    """
    shown = [*paper_tables(results(done, weights), tables), *([weights_table(done, weights)] if done else [])]
    texts = {suffix: render_all(shown, style) for suffix, style in TABLES.items()}
    texts["html"] = page(name, {"Results": texts["html"]})
    for suffix, text in texts.items():
        write_text(output / f"{name}.{suffix}", text)
    return texts["md"]
