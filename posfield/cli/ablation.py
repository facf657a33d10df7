"""The ablation at toy scale: the rows of the paper's Table 3 and both readings of s, over seeds, as resumable jobs.

posfield ablation --output runs/ablation --jobs 4 --max-minutes 9      (exit code 85: not finished, start it again)

A job is a toy pre-training (configs/pretrain/toy.yaml with what the row's config changes) and a detection
fine-tuning on toy data. What is finished is not run again, a job that fails does not stop the others; a
SIGTERM is passed on to all that runs. It ends in a table: ablation.md and .csv.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from posfield.cli.demo import DATA, DETECTION, QUICK_DATA, QUICK_DETECTION, QUICK_PRETRAIN, last
from pretrain.cli import command, command_parser
from pretrain.config import RECIPES
from pretrain.errors import UserError, one_line
from pretrain.files import write_text
from pretrain.jobs import DONE, FAILED, GRACE_S, LEFT, Runner, Stage, raise_for
from pretrain.results import read_result
from pretrain.results.ablation import Trial, ablation_table
from pretrain.results.folder import leave_readme
from pretrain.results.render import render
from pretrain.run_lock import tidy
from pretrain.settings import flat, read_yaml
from pretrain.signals import interruptible

# In the table's order; each but the method itself is pretrain/recipes/ablation/NAME.yaml.
ROWS = ("table3_none", "table3_sampling", "table3_lpos", "method", "reference_image")


def plan(options: argparse.Namespace) -> dict[str, list[Stage]]:
    """The stages of every job, seed by seed: an unfinished ablation has all rows of its first seeds."""
    jobs, data, quick = {}, options.output / "data", options.quick
    protocol = last(DETECTION, QUICK_DETECTION if quick else [], options.detection)
    for seed in range(options.seeds):
        for row in ROWS:
            folder = options.output / row / f"seed_{seed}"
            where = [f"data.root={data / 'images'}", f"run.output={folder / 'pretrain'}", f"run.seed={seed}"]
            file = RECIPES / "ablation" / f"{row}.yaml"  # of the method itself there is none
            own = flat(read_yaml(file).values) if row != "method" else {}
            of_row = [f"{key}={text}" for key, text in own.items() if key not in ("base", "run.output")]
            changed = last(of_row, QUICK_PRETRAIN if quick else [], options.pretrain)
            first = command("pretrain", "--resume", "--config", "toy", *where, *changed)
            words = ["--engine", "torchvision", "--weights", folder / "pretrain" / "backbone.safetensors"]
            words += ["--data", data / "coco", "--seed", seed, "--output", folder / "det", "--resume"]
            second = command("detect", *words, *protocol)
            stages = [Stage("pretrain", folder / "pretrain", first), Stage("det", folder / "det", second)]
            jobs[f"{row}/seed_{seed}"] = stages
    return jobs


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/ablation"), help="folder of all jobs (%(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (%(default)s)")
    add("--jobs", type=int, default=1, metavar="N", help="at a time; one GPU holds several (%(default)s)")
    limit = "of this call; then start it again"
    add("--max-minutes", type=float, default=float("inf"), metavar="M", help=limit)
    add("--quick", action="store_true", help="a few steps of everything: to see it run on a CPU")
    for name, told in (("pretrain", "settings of every one"), ("detection", "fields of the protocol")):
        add(f"--{name}", nargs="+", default=[], metavar="key=value", help=told)
    options = parser.parse_args(arguments)
    if min(options.seeds, options.jobs) < 1 or options.max_minutes * 60 <= GRACE_S:
        raise UserError(f"--seeds and --jobs are at least 1, --max-minutes is more than {GRACE_S / 60:g}")
    return options


def main(arguments: list[str]) -> None:
    """Plan, run, and write the table of what is done."""
    options = parse(arguments)
    begun = time.monotonic()
    data = command("toy-data", "--output", options.output / "data", *(QUICK_DATA if options.quick else DATA))
    jobs = plan(options)
    tidy(options.output, *(stage.folder.parent for stages in jobs.values() for stage in stages[:1]))
    with interruptible():
        if subprocess.run(data).returncode:
            raise UserError(f"failed: {shlex.join(data)}")
    seconds = begun + 60 * options.max_minutes - GRACE_S - time.monotonic()
    ended = Runner(options.jobs, seconds).run(jobs)
    done, failed, left = ([n for n, how in ended.items() if how == which] for which in (DONE, FAILED, LEFT))
    trials = []
    for name in done:
        try:
            trials.append(Trial(*(read_result(stage.folder) for stage in jobs[name])))
        except UserError as error:
            print(f"left out: {name}: {one_line(error)}", file=sys.stderr)
            failed.append(name)
    table = ablation_table(trials, "intertwined", "Ablation at toy scale")
    for style in ("md", "csv"):
        write_text(options.output / f"ablation.{style}", render(table, style))
    leave_readme(options.output, "ablation")
    print(render(table, "md"))
    logs = f"{', '.join(failed)} (logs in {options.output}/JOB/*.log)"
    raise_for(f"{len(failed)} of {len(jobs)} jobs failed: {logs}" * bool(failed), left, f"{len(jobs)} jobs")
