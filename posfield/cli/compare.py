"""Compare pre-trainings: detection and segmentation of every row of configs/compare/NAME.yaml, and the
tables.

posfield compare configs/compare/table1_vits16.yaml --output runs/compare --weights W --coco COCO --ade
ADE --jobs 8 posfield compare configs/compare/table1_vits16.yaml --output runs/compare --status python
posfield compare configs/compare/table1_vits16.yaml --output runs/compare --weights W --submit -- --hours 24
--partition gpu

Finished runs are not repeated, stopped ones resume (exit code 85: start it again), a failed run stops no other. Rows
without a file are named and skipped. The results are in OUTPUT/ROW/RUN, the tables in OUTPUT/CONFIG.*. Words with = set
a key of the yaml: detection=coco10pct-12ep segmentation=none seeds=0,1,2 detection_overrides.batch_size=32.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from det_plugin.protocol import PROTOCOLS, protocol, with_overrides
from pretrain import compare
from pretrain.cli import fields_and_kwargs
from pretrain.compare import FineTuning, Weights
from pretrain.compare_config import NONE, Comparison, Entry, load_comparison, name_of, words_of
from pretrain.errors import Interrupted, UserError
from pretrain.jobs import GRACE_S

TOOLS = Path(__file__).resolve().parent


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of posfield submit behind ``--``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a file of configs/compare/")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of all runs")
    for name, what in {
        "weights": "folder of the files that the rows name",
        "coco": "COCO",
        "ade": "ADE20K",
    }.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"{what} (as the config says)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="these rows, by the names that --status shows"
    )
    parser.add_argument("--strict", action="store_true", help="stop where a file is missing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--gpus-per-run", type=int, default=1, metavar="N", help="of a run (%(default)s)")
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=float("inf"),
        metavar="M",
        help="of this call; then start it again",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--submit",
        action="store_true",
        help="a SLURM job for every run; options of posfield submit behind --",
    )
    instead.add_argument("--status", action="store_true", help="only show what is done")
    instead.add_argument("--tables", action="store_true", help="only write the tables of what is done")
    parser.add_argument("--dry-run", action="store_true", help="only show the commands, or the SLURM jobs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_intermixed_args(arguments[:end])
    options.overrides += [word for word in options.only if "=" in word]
    options.only = [word for word in options.only if "=" not in word]
    if min(options.jobs, options.gpus_per_run) < 1 or options.max_minutes * 60 <= GRACE_S:
        raise UserError(
            f"--jobs and --gpus-per-run are at least 1, --max-minutes is more than {GRACE_S / 60:g}"
        )
    if arguments[end + 1 :] and not options.submit:
        raise UserError("--: what stands behind it is for --submit")
    return options, arguments[end + 1 :]


def read(options: argparse.Namespace) -> tuple[Comparison, list[Entry]]:
    """The comparison, and the rows of it that are asked for."""
    folders = [
        f"{key}={value}" for key in ("weights", "coco", "ade") if (value := getattr(options, key)) is not None
    ]
    comparison = load_comparison(options.config, [*options.overrides, *folders], PROTOCOLS)
    for entry in comparison.entries:  # before anything is begun
        if (name := entry.detection or comparison.detection) != NONE:
            with_overrides(
                protocol(name, entry.backbone), fields_and_kwargs(words_of(comparison.detection_overrides))[0]
            )
    rows = {name_of(entry): entry for entry in comparison.entries}
    if unknown := [name for name in options.only if name not in rows]:
        raise UserError(f"--only: {options.config} has no row {unknown[0]!r}; there are {', '.join(rows)}")
    return comparison, [rows[name] for name in options.only or rows]


def submit(each: FineTuning, comparison: Comparison, options: argparse.Namespace, further: list[str]) -> None:
    """Hand a run to SLURM: a job of --gpus-per-run tasks; a sweep as an array, a GPU each."""
    stage, words, array, gpus = each.stage(TOOLS), list(each.arguments), [], options.gpus_per_run
    if each.is_sweep:
        from seg_plugin import protocol as seg

        grid = seg.with_overrides(
            seg.protocol(), fields_and_kwargs(words_of(comparison.segmentation_overrides))[0]
        )
        array = ["--array", str(len(grid.lr_grid) * len(grid.weight_decay_grid) * grid.seeds)]
        words, gpus = [*words, "--sweep", "{index}"], 1
    logs = ["--name", each.name.replace("/", "."), "--folder", str(options.output / "jobs" / "%j")]
    job = ["--gpus", str(gpus), *array, *logs, *["--dry-run"] * options.dry_run, *further]
    command = [sys.executable, str(TOOLS / "submit.py"), *job, "--", str(TOOLS / each.tool), *words]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(f"{each.name}: {said.stdout.strip()}", flush=True)
    if said.returncode:
        raise UserError(f"{each.name} was not submitted")
    if number := re.match(r"submitted (\d+)", said.stdout):
        stage.sign()
        compare.job_note(stage).write_text(number[1])


def go_on(comparison: Comparison, weights: Mapping[str, Weights], runs: list[FineTuning], options: argparse.Namespace,
          further: list[str]) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """Make the weights ours, then run or submit what is not done; {what failed: why}, and the runs that
    are left."""
    stages = {each.name: each.stage(TOOLS, options.gpus_per_run) for each in runs}
    states = {name: compare.state(stage) for name, stage in stages.items()}
    failed = {name: compare.difference(stages[name]) for name, how in states.items() if how == compare.OTHER}
    begin = [each for each in runs if compare.is_to_begin(states[each.name])]
    if not options.dry_run:
        compare.check_data(comparison, begin)
        failed |= compare.prepare_all(weights, [each.entry for each in begin], options.output)
        begin = [each for each in begin if name_of(each.entry) not in failed]
    if options.submit:
        for each in begin:
            submit(each, comparison, options, further)
        return failed, []
    if options.dry_run:
        print("\n".join(shlex.join(stages[each.name].command) for each in begin))
        return failed, []
    seconds = 60 * options.max_minutes - GRACE_S
    ended = compare.run_all(begin, TOOLS, options.jobs, options.gpus_per_run, seconds, comparison.device)
    failed |= {name: f"its log is {stages[name].log}" for name, how in ended.items() if how == "failed"}
    elsewhere = [
        name for name, how in states.items() if how != compare.OTHER and not compare.is_to_begin(how)
    ]
    return failed, [name for name in (*elsewhere, *ended) if not stages[name].is_done and name not in failed]


def main(arguments: list[str]) -> None:
    """Plan, go on, write the tables, and say what failed and what is left."""
    options, further = parse(arguments)
    comparison, rows = read(options)
    weights = compare.find_all(comparison, options.output)
    lost = {name_of(entry): entry for entry in rows if name_of(entry) not in weights}
    for name, entry in lost.items():
        print(
            f"{'no weights':<16} {name}: {Path(comparison.weights) / entry.file} ({entry.origin or 'whence is not said'})"
        )
    if lost and options.strict:
        raise UserError(f"--strict: {len(lost)} of {len(rows)} files are missing")
    planned = compare.plan(comparison, weights, options.output, options.gpus_per_run)
    runs = [each for each in planned if each.entry in rows]
    if options.status:
        return print(*(f"{compare.state(each.stage(TOOLS)):<16} {each.name}" for each in runs), sep="\n")
    failed, left = ({}, []) if options.tables else go_on(comparison, weights, runs, options, further)
    if not options.dry_run:
        done = [each for each in planned if each.stage(TOOLS).is_done]
        print(compare.write_tables(done, weights, comparison.tables, options.output, options.config.stem))
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    told = f"failed: {', '.join(failed)}"
    if left:
        raise Interrupted(
            f"{len(left)} of {len(runs)} runs are left: start it again" + f"; {told}" * bool(failed)
        )
    if failed:
        raise UserError(told)
