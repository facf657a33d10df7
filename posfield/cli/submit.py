"""Submit a command to SLURM: many GPUs and nodes, put back when its time is over or it is preempted.

posfield submit --nodes 2 --gpus 4 --hours 48 --partition gpu -- pretrain \\
    --config configs/pretrain/intertwined_vitb16.yaml data.root=imagenet/train

The command is one of posfield, a Python file (tools/train_det.py ...) or any program. An array: {index} in it is
the number of the job.
posfield submit --gpus 1 --array 16 -- segment --sweep {index} --weights W --data ADE --output seg --resume

--dry-run shows the job where there is no SLURM; --local runs it on this machine. How it works:
pretrain/jobs/slurm.py.
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from posfield.cli import COMMANDS
from pretrain.cli import command, command_parser
from pretrain.errors import UserError
from pretrain.jobs.slurm import Resources, ToolJob, run_here, sbatch_script, submit, tool_jobs
from pretrain.settings import validated

OPTIONS = [name for name in Resources.model_fields if name != "extra"]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the command behind ``--``."""
    parser = command_parser(__doc__)
    parser.usage = "%(prog)s [options] -- COMMAND [arguments]"
    add = parser.add_argument
    for name in OPTIONS:
        info = Resources.model_fields[name]
        option, told = f"--{name.replace('_', '-')}", f"{info.description} (%(default)s)"
        add(option, type=type(info.default), default=info.default, metavar="N", help=told)
    add("--array", type=int, default=0, metavar="N", help="N jobs; {index} in the command is 0 to N - 1")
    examples = "options of sbatch: account=a exclusive=true"
    add("--slurm", nargs="+", default=[], metavar="key=value", help=examples)
    add("--folder", type=Path, default=Path("runs/jobs/%j"), help="logs; %%j: the job's number (%(default)s)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="only show the job")
    where.add_argument("--local", action="store_true", help="run it here, and wait")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_args(arguments[:end]), arguments[end + 1 :]


def resources_of(options: argparse.Namespace) -> Resources:
    """What the options ask for.

    Raises:
        UserError: a number out of range, or a word of --slurm without =.
    """
    extra: dict[str, str | bool] = {}
    for word in options.slurm:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise UserError(f"--slurm: {word!r} is not of the form key=value")
        extra[key.lstrip("-")] = True if value == "true" else value
    values = {name: getattr(options, name) for name in OPTIONS}
    return validated(Resources, {**values, "extra": extra}, "submit")


def found(words: list[str]) -> list[str]:
    """A command line that runs in any folder, of one as it is typed.

    Raises:
        UserError: it is neither a command of posfield, nor a Python file, nor a program.
    """
    name, rest = Path(words[0] if words else "").name, words[1:]
    if name == "posfield" or (name in ("python", "python3") and rest and rest[0].endswith(".py")):
        words = rest
    if not words:
        raise UserError("no command: put it behind --, as in: -- pretrain --config FILE")
    if words[0] in {name.split()[0] for name in COMMANDS}:
        return command(*words)
    is_python = words[0].endswith(".py")
    file = words[0] if is_python else shutil.which(words[0])
    if file is None or not Path(file).is_file():
        raise UserError(f"command: {words[0]} is no command of posfield, no Python file and no program")
    return [*[sys.executable] * is_python, os.path.abspath(file), *words[1:]]


def describe(jobs: list[ToolJob], resources: Resources, folder: Path) -> str:
    """The script for sbatch, what each task of it does, and what it does when it comes back."""
    n_tasks, n_here = resources.nodes * resources.ranks_per_node, resources.ranks_per_node
    ranks = f"RANK=0..{n_tasks - 1} WORLD_SIZE={n_tasks} LOCAL_RANK=0..{n_here - 1} " if n_tasks > 1 else ""
    lines = [f"# {n_tasks} task{'s' * (n_tasks > 1)}, one a rank:", ranks + shlex.join(jobs[0].words)]
    lines += ["# and after a preemption or the time limit:", ranks + shlex.join(jobs[0].resumed().words)]
    if len(jobs) > 1:
        told = f"job {len(jobs) - 1}: {shlex.join(jobs[-1].words)}"
        lines.append(f"# this is job 0 of the array of {len(jobs)}; {told}")
    return "\n".join([sbatch_script(resources, folder, len(jobs)), *lines])


def main(arguments: list[str]) -> None:
    """Parse, build, submit."""
    options, words = parse(arguments)
    jobs = tool_jobs(found(words), options.array)
    resources = resources_of(options)
    tool = jobs[0].words[jobs[0].words[0] in ("posfield", "python")]
    resources = resources.model_copy(update={"name": resources.name or Path(tool).stem})
    if options.dry_run:
        print(describe(jobs, resources, options.folder))
    elif options.local:
        for job in jobs:
            run_here(job, resources, options.folder)
        print(f"done; logs are in {options.folder}")
    else:
        numbers = submit(jobs, resources, options.folder)
        print(f"submitted {', '.join(numbers)}; logs will be in {options.folder}")
