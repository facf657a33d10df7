"""A comparison: how the weights are converted, which runs there are, and the tables of what is done.

:func:`prepare` converts every file of weights to our format, so that a run needs only its path. The runs of
:func:`plan` do not depend on each other.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pretrain.build import PROTOCOL_PATCH_PX
from pretrain.cli import command
from pretrain.data import digest
from pretrain.errors import UserError
from pretrain.export.converted import convert
from pretrain.files import read_mapping, write_text
from pretrain.jobs.compare_config import NONE, SWEEP, Comparison, Entry, name_of, words_of
from pretrain.jobs.slurm import INDEX
from pretrain.jobs.stage import Stage
from pretrain.results.folder import leave_readme
from pretrain.results.pages import page
from pretrain.results.paper import paper_tables
from pretrain.results.provenance import file_hash
from pretrain.results.render import render_all
from pretrain.results.schema import FILE_NAME, Result, read_result
from pretrain.results.tables import Line, Table
from pretrain.results.untrusted import parsed
from pretrain.weights.sources.posfield import FORMAT

ASKED = ("source", "subnet", "patch_size", "method", "effective_epochs")  # options of convert() in an entry
TABLES = {"csv": "csv", "tex": "latex", "html": "html", "md": "md"}  # {suffix: format}
# torchrun for one machine: its agent needs a file alone, and the ranks meet on the loopback. (--standalone serves
# every address of the machine, without a password.)
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
TORCHRUN += ["--local-addr=127.0.0.1"]


@dataclass(frozen=True)
class Weights:
    """An entry's weights.

    Attributes:
        file: what the runs read: the entry's file, or what it was converted to.
        source: the file that the entry names.
        identity: what the runs depend on of it: ``key=value`` words.
        note: the file that says from what, and how, they were made; finished runs need no more.
    """

    file: Path
    source: Path
    identity: tuple[str, ...]
    note: Path

    @property
    def digest(self) -> str:
        """Hash of the file that the entry names."""
        return self.identity[0].removeprefix("weights=")

    @property
    def is_ready(self) -> bool:
        """Whether the runs can begin."""
        files = self.file.is_file() and self.note.is_file()
        return files and self.note.read_text() == shlex.join(self.identity)


def find_weights(comparison: Comparison, entry: Entry, output: Path) -> Weights | None:
    """Where an entry's weights are; None where its file is missing, and was missing the last time, too."""
    source, note = Path(comparison.weights) / entry.file, output / "weights" / f"{name_of(entry)}.command"
    asked = {key: value for key in ASKED if (value := getattr(entry, key)) is not None}
    noted = shlex.split(note.read_text()) if note.is_file() else []
    if os.access(source, os.R_OK):  # a file, or a folder of Hugging Face's
        digest = file_hash(source, "".join(noted[:1]).removeprefix("weights="))
        is_ours = _metadata(source).get("format") == FORMAT and asked.keys() == {"method"}
    elif noted:
        digest, is_ours = noted[0].removeprefix("weights="), len(noted) == 2
    else:
        return None
    says = {"weights": digest, "backbone": entry.backbone, **({} if is_ours else asked)}
    identity = tuple(f"{key}={value}" for key, value in says.items())
    return Weights(source if is_ours else note.with_suffix(".safetensors"), source, identity, note)


def find_all(comparison: Comparison, output: Path) -> dict[str, Weights]:
    """:func:`find_weights` of every entry of which there are weights, by name."""
    entries = comparison.entries
    return {name_of(e): found for e in entries if (found := find_weights(comparison, e, output)) is not None}


def prepare(entry: Entry, weights: Weights) -> None:
    """Make the file that an entry's runs read, where it is not there yet.

    Raises:
        UserError: what is wrong with the file that the entry names.
    """
    if weights.is_ready:
        return
    if weights.file != weights.source:
        asked = {key: getattr(entry, key) for key in ASKED}
        convert(weights.source, weights.file, name=entry.backbone, **asked)
    elif (found := _metadata(weights.file).get("backbone", "no file")) != entry.backbone:
        raise UserError(f"weights: {weights.file}: {found}, not {entry.backbone}")
    write_text(weights.note, shlex.join(weights.identity))


def prepare_all(weights: Mapping[str, Weights], entries: Sequence[Entry]) -> dict[str, str]:
    """:func:`prepare` for every entry, once; {name: why} of those that failed."""
    failed: dict[str, str] = {}
    for name, entry in {name_of(entry): entry for entry in entries}.items():
        try:
            prepare(entry, weights[name])
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


def _told(file: Path, key: str) -> dict[str, Any]:
    """The mapping in the metadata; none where it is something else."""
    try:
        said = parsed(_metadata(file).get(key, "{}"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


@dataclass(frozen=True, kw_only=True)
class FineTuning(Stage):
    """One run of posfield detect or segment (its kind) for a row, or the sweep of the segmentation."""

    entry: Entry


def plan(
    comparison: Comparison,
    weights: Mapping[str, Weights],
    output: Path,
    n_gpus: int = 1,
    sweep_jobs: int | None = None,
    data_changed: bool = False,
) -> list[FineTuning]:
    """The runs of all entries of which there are weights ({name: weights}). They go seed by seed, so that an
    unfinished comparison has every row; a sweep comes with the first seed.

    Args:
        n_gpus: of a run; of a sweep on this machine, its runs at a time.
        sweep_jobs: for SLURM, of how many jobs a sweep is; None: for this machine, where torchrun starts a
            process for each GPU.
        data_changed: runs go on over other data than before.
    """

    def fine_tuning(entry: Entry, task: str, kind: str, seed: int) -> FineTuning:
        row, of_entry = output / name_of(entry), weights[name_of(entry)]
        is_sweep = kind == SWEEP
        if task == "detection":
            name, folder = "detect", row / f"det_{kind}_seed{seed}"
            recipe = ["--engine", comparison.engine, "--protocol", kind]
            rest = ["--data", comparison.coco, "--accumulate", str(-(-comparison.accumulate // n_gpus))]
            rest += ["--checkpointing"] * comparison.checkpointing
        else:
            name, folder = "segment", row / ("seg_sweep" if is_sweep else f"seg_seed{seed}")
            recipe, rest = ["--dataset", "ade20k"], ["--data", comparison.ade]
        recipe += ["--seed", str(seed)]  # the result depends on it, unlike on the rest
        changed = words_of(getattr(comparison, f"{task}_overrides"))
        rest += [*["--resume"] * (not is_sweep), "--weights", str(of_entry.file), "--output", str(folder)]
        rest += ["--device", comparison.device, *["--data-changed"] * data_changed]
        rest += ["--workers", str(comparison.workers)] * (comparison.workers is not None)
        if is_sweep:
            rest += ["--sweep", *(["--jobs", str(n_gpus)] if sweep_jobs is None else [INDEX])]
        line = command(name, *changed, *recipe, *rest)
        if n_gpus > 1 and sweep_jobs is None and not is_sweep:
            line[1:1] = [*TORCHRUN, "--nproc-per-node", str(n_gpus)]
        kept = [name, *recipe, *["--sweep"] * is_sweep, *changed, *of_entry.identity]
        identity, array = shlex.join(["posfield", *kept]), (sweep_jobs or 0) * is_sweep
        return FineTuning(name, folder, line, identity, array, entry=entry)

    return [
        fine_tuning(entry, task, kind, seed)
        for seed in comparison.seeds
        for task in ("detection", "segmentation")
        for entry in comparison.entries
        if name_of(entry) in weights
        and (kind := getattr(entry, task) or getattr(comparison, task)) != NONE
        and (kind != SWEEP or seed == comparison.seeds[0])
    ]


def check_data(comparison: Comparison, runs: Sequence[FineTuning]) -> None:
    """Before anything is begun.

    Raises:
        UserError: no such folder of data, by its key.
    """
    for name, key in (("detect", "coco"), ("segment", "ade")):
        if any(run.kind == name for run in runs) and not Path(folder := getattr(comparison, key)).exists():
            raise UserError(f"{key}: there is no {folder}")


def check_same_data(
    runs: Sequence[FineTuning],
    begin: Sequence[FineTuning],
    now: Callable[[str], Mapping[str, digest.Values]],
    data_changed: bool,
) -> None:
    """Before anything is begun: all runs of a kind are over the same data, those that are done, too.

    Args:
        begin: those of the ``runs`` that are to begin or to go on.
        now: the digest of a kind's data; asked for where a run has left one to compare.

    Raises:
        UserError: they are not, and that is not wanted.
    """
    for kind in sorted({run.kind for run in begin}):
        files = [
            (run, file) for run in runs if run.kind == kind for file in run.folder.rglob(digest.FILE_NAME)
        ]
        today = now(kind) if files else {}
        for run, file in files:
            before = read_mapping(file, "output").get("digest", {})
            digest.accept(run.name, digest.differences(before, today), "data", data_changed)


def results(
    done: Sequence[FineTuning], weights: Mapping[str, Weights]
) -> tuple[list[Result], dict[str, str]]:
    """The results of finished runs, under the comparison's names of the methods, and of our own pre-trainings beside
    the weights: these tell whether they were scaled down. And {name of a run: why it cannot be read}."""
    found, unread = [], {}
    for run in done:
        of_run = weights[name_of(run.entry)]
        beside = of_run.source.with_name(FILE_NAME)
        try:
            result = read_result(run.folder)
            before = read_result(beside) if beside.is_file() else None
        except UserError as error:
            unread[run.name] = str(error)
            continue
        found.append(result.with_changes(method=run.entry.method))
        if before and (before.kind, before.weights_hash) == ("pretrain", of_run.digest):
            # the run may have read a converted file
            found.append(before.with_changes(weights_hash=result.weights_hash))
    return found, unread


def weights_table(done: Sequence[FineTuning], weights: Mapping[str, Weights]) -> Table:
    """Of which files the rows of these runs are, and how they were read."""
    lines = []
    for name, entry in {name_of(run.entry): run.entry for run in done}.items():
        model_kwargs, told = (_told(weights[name].file, key) for key in ("flags", "provenance"))
        patch = told.get("patch_size_before", model_kwargs.get("patch_size", PROTOCOL_PATCH_PX))
        read_as = " ".join(str(told[key]) for key in ("source", "subnet") if key in told) or "ours"
        resampled = "" if patch == PROTOCOL_PATCH_PX else f", resampled to {PROTOCOL_PATCH_PX}"
        cells = (name, entry.method, entry.file, weights[name].digest, read_as, f"{patch} px{resampled}")
        lines.append(Line("weights", False, cells))
    columns = ("row", "method", "file", "hash", "read as", "patches")
    return Table.of("The files of weights", columns, [lines], (), (), ())


def write_tables(
    done: Sequence[FineTuning], weights: Mapping[str, Weights], tables: str, output: Path, name: str
) -> tuple[str, dict[str, str]]:
    """Write ``NAME.md``, ``.csv``, ``.tex`` and ``.html``: the published tables beside what was measured, and the files
    of weights.

    Returns:
        the first of them, and {name of a run that is not in it: why it cannot be read}.
    """
    found, unread = results(done, weights)
    shown = [*paper_tables(found, tables), *([weights_table(done, weights)] if done else [])]
    texts = {suffix: render_all(shown, style) for suffix, style in TABLES.items()}
    texts["html"] = page(name, {"Results": texts["html"]})
    for suffix, text in texts.items():
        write_text(output / f"{name}.{suffix}", text)
    leave_readme(output, "compare")
    return texts["md"], unread
