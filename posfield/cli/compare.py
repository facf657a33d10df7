"""Compare pre-trainings: detection and segmentation of every row of configs/compare/NAME.yaml, and the tables.

posfield compare table1_vits16 --output runs/compare --weights W --coco COCO --ade ADE --jobs 8
posfield compare table1_vits16 --output runs/compare --status
posfield compare table1_vits16 --output runs/compare --weights W --submit -- --hours 24 \\
    --partition gpu

Finished runs are not repeated, stopped ones resume (exit code 85: start it again), a failed run stops no other. Rows
without a file are named and skipped. The results are in OUTPUT/ROW/RUN, the tables in OUTPUT/CONFIG.*. Words with = set
a key of the yaml: detection=coco10pct-12ep segmentation=none seeds=0,1,2 detection_overrides.batch_size=32.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from det_plugin.coco.layout import locate
from det_plugin.protocol import PROTOCOLS, protocol, with_overrides
from posfield.cli import submit
from pretrain.cli import add_data_changed, command_parser, fields_and_kwargs
from pretrain.config import SHIPPED
from pretrain.data.datasets import open_label_sets
from pretrain.errors import UserError, one_line
from pretrain.jobs import FAILED, GRACE_S, LEFT, Runner, compare, raise_for
from pretrain.jobs.compare import FineTuning, Weights
from pretrain.jobs.compare_config import NONE, SWEEP, Comparison, Entry, load_comparison, name_of, words_of
from pretrain.jobs.slurm import Queue
from pretrain.jobs.stage import OTHER, is_to_begin
from pretrain.run_lock import tidy


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of posfield submit behind ``--``."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file, or one of configs/compare by name: toy")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of all runs")
    folders = {"weights": "folder of the files that the rows name", "coco": "COCO", "ade": "ADE20K"}
    for name, what in folders.items():
        add(f"--{name}", metavar="DIR", help=f"{what} (as the config says)")
    add("--only", nargs="+", default=[], metavar="ROW", help="these rows, by the names that --status shows")
    add("--strict", action="store_true", help="stop where a file is missing")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    add("--gpus-per-run", type=int, default=1, metavar="N", help="of a run (%(default)s)")
    limit = "of this call; then start it again"
    add("--max-minutes", type=float, default=float("inf"), metavar="M", help=limit)
    instead = parser.add_mutually_exclusive_group()
    slurm = "a SLURM job for every run; options of posfield submit behind --"
    instead.add_argument("--submit", action="store_true", help=slurm)
    instead.add_argument("--status", action="store_true", help="only show what is done")
    instead.add_argument("--tables", action="store_true", help="only write the tables of what is done")
    add_data_changed(parser)
    add("--dry-run", action="store_true", help="only show the commands, or the SLURM jobs")
    add("overrides", nargs="*", metavar="key=value", help="keys of the config")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_intermixed_args(arguments[:end])
    options.overrides += [word for word in options.only if "=" in word]
    options.only = [word for word in options.only if "=" not in word]
    if min(options.jobs, options.gpus_per_run) < 1 or options.max_minutes * 60 <= GRACE_S:
        minutes = f"--max-minutes is more than {GRACE_S / 60:g}"
        raise UserError(f"--jobs and --gpus-per-run are at least 1, {minutes}")
    if arguments[end + 1 :] and not options.submit:
        raise UserError("--: what stands behind it is for --submit")
    return options, arguments[end + 1 :]


def read(options: argparse.Namespace) -> tuple[Comparison, list[Entry]]:
    """The comparison, and the rows of it that are asked for."""
    shipped = SHIPPED / "compare"
    if not options.config.is_file() and (shipped / f"{options.config}.yaml").is_file():
        options.config = shipped / f"{options.config}.yaml"
    elif not options.config.is_file():
        names = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
        raise UserError(f"{options.config}: no such file, and no shipped comparison; there are {names}")
    folders = {key: getattr(options, key) for key in ("weights", "coco", "ade")}
    given = [f"{key}={value}" for key, value in folders.items() if value is not None]
    comparison = load_comparison(options.config, [*options.overrides, *given], PROTOCOLS)
    fields, _ = fields_and_kwargs(words_of(comparison.detection_overrides))
    for entry in comparison.entries:  # before anything is begun
        if (name := entry.detection or comparison.detection) != NONE:
            with_overrides(protocol(name, entry.backbone), fields)
    rows = {name_of(entry): entry for entry in comparison.entries}
    if unknown := [name for name in options.only if name not in rows]:
        raise UserError(f"--only: {options.config} has no row {unknown[0]!r}; there are {', '.join(rows)}")
    return comparison, [rows[name] for name in options.only or rows]


def sweep_jobs(comparison: Comparison) -> int:
    """Of how many jobs the array of a sweep is; 0 where there is none, for which MMSegmentation is not needed."""
    if SWEEP not in [entry.segmentation or comparison.segmentation for entry in comparison.entries]:
        return 0
    from seg_plugin.protocol import protocol, with_overrides

    fields, _ = fields_and_kwargs(words_of(comparison.segmentation_overrides))
    grid = with_overrides(protocol(), fields)
    return len(grid.lr_grid) * len(grid.weight_decay_grid) * grid.seeds


def data_now(comparison: Comparison, kind: str) -> dict[str, Any]:
    """The digest of the data of all runs of a kind, as far as it is cheap: of COCO the annotations."""
    if kind == "detect":
        return {split: {"annotations": locate(comparison.coco, split).hash()} for split in ("train", "val")}
    parts = open_label_sets(comparison.ade, "ade20k")
    return {part: found.digest() for part, found in zip(("training", "validation"), parts)}


def go_on(
    comparison: Comparison, weights: Mapping[str, Weights], runs: list[FineTuning], options: argparse.Namespace,
    queue: Queue | None,
) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """Make the weights ours, run or submit what is not done; {what failed: why}, and the runs that are left."""
    states = {run.name: run.state for run in runs}
    failed = {run.name: run.difference for run in runs if states[run.name] == OTHER}
    begin = [run for run in runs if is_to_begin(states[run.name])]
    if options.dry_run:
        for run in begin:
            of_job = queue and f"{run.name}: {submit.describe(*queue.jobs(run), queue.folder)}"
            print(of_job or shlex.join(run.command))
        return failed, []
    compare.check_data(comparison, begin)
    compare.check_same_data(runs, begin, lambda kind: data_now(comparison, kind), options.data_changed)
    failed |= compare.prepare_all(weights, [run.entry for run in begin])
    n_gpus = 0 if comparison.device == "cpu" else options.gpus_per_run
    runner = Runner(options.jobs, 60 * options.max_minutes - GRACE_S, n_gpus, queue)
    ended = runner.run({run.name: [run] for run in runs if name_of(run.entry) not in failed})
    failed = {r.name: f"its log is {r.log}" for r in runs if ended.get(r.name) == FAILED} | failed
    return failed, [name for name, how in ended.items() if how == LEFT and not queue]


def main(arguments: list[str]) -> None:
    """Plan, go on, write the tables, and say what failed and what is left."""
    options, further = parse(arguments)
    comparison, rows = read(options)
    words = ["--gpus", str(options.gpus_per_run), "--folder", str(options.output / "jobs" / "%j"), *further]
    asked = submit.parse(words)[0] if options.submit else None  # jobs of --gpus-per-run tasks
    queue = Queue(submit.resources_of(asked), asked.folder) if asked else None
    if not (options.status or options.dry_run):
        tidy(
            options.output,
            *(options.output / name for name in ("weights", *map(name_of, comparison.entries))),
        )
    weights = compare.find_all(comparison, options.output)
    lost = {name_of(entry): entry for entry in rows if name_of(entry) not in weights}
    for name, entry in lost.items():
        file, whence = Path(comparison.weights) / entry.file, entry.origin or "whence is not said"
        whence = whence.replace("WEIGHTS/", f"{comparison.weights}/")
        print(f"{'no weights':<16} {name}: {file} ({whence})")
    if lost and options.strict:
        raise UserError(f"--strict: {len(lost)} of {len(rows)} files are missing")
    n_jobs = sweep_jobs(comparison) if queue else None
    how = options.gpus_per_run, n_jobs, options.data_changed
    planned = compare.plan(comparison, weights, options.output, *how)
    runs = [run for run in planned if run.entry in rows]
    if lost and not runs and not (options.status or options.dry_run or options.tables):
        raise UserError(f"nothing to run: all {len(lost)} files above are missing in {comparison.weights}")
    if options.status:
        return print(*(f"{run.state:<16} {run.name}" for run in runs), sep="\n")
    failed, left = ({}, []) if options.tables else go_on(comparison, weights, runs, options, queue)
    if not options.dry_run:
        done = [run for run in planned if run.is_done]
        where = options.output, options.config.stem
        text, unread = compare.write_tables(done, weights, comparison.tables, *where)
        print(text)
        failed |= unread
    for name, why in failed.items():
        print(f"failed: {name}: {one_line(why)}", file=sys.stderr)
    raise_for(f"failed: {', '.join(failed)}" if failed else "", left, f"{len(runs)} runs")
