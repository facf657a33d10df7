"""Submit a tool of ours to SLURM: several GPUs and nodes, put back into the queue when its time is over or it is preempted.

posfield submit --nodes 2 --gpus 4 --hours 48 --partition gpu -- posfield pretrain \\
    --config configs/pretrain/intertwined_vitb16.yaml data.root=imagenet/train

An array: {index} in the command is the number of the job.
posfield submit --gpus 1 --array 16 -- posfield segment --sweep {index} --weights W --data ADE --output seg --resume

--dry-run shows the job where there is no SLURM; --local runs it on this machine. How it works: pretrain/slurm.py. Its path was
tested against stand-ins of SLURM's commands, not on a cluster.
"""

import argparse
import os
import shlex
from pathlib import Path

from pretrain.errors import UserError
from pretrain.settings import validated
from pretrain.slurm import Resources, ToolJob, run_here, sbatch_script, slurm_executor, submit, tool_jobs

OPTIONS = [name for name in Resources.model_fields if name != "extra"]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the command behind ``--``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- TOOL.py [arguments]",
    )
    for name in OPTIONS:
        info = Resources.model_fields[name]
        option, kind = f"--{name.replace('_', '-')}", type(info.default)
        parser.add_argument(
            option, type=kind, default=info.default, metavar="N", help=f"{info.description} (%(default)s)"
        )
    parser.add_argument(
        "--array", type=int, default=0, metavar="N", help="N jobs; {index} in the command is 0 to N - 1"
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="key=value",
        help="options of sbatch: account=a exclusive=true",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/jobs/%j"), help="logs; %%j: the job's number (%(default)s)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="only show the job")
    where.add_argument("--local", action="store_true", help="run it here, and wait")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_args(arguments[:end]), arguments[end + 1 :]


def resources_of(options: argparse.Namespace, tool: str) -> Resources:
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
    return validated(Resources, {**values, "name": options.name or tool, "extra": extra}, "submit")


def describe(jobs: list[ToolJob], resources: Resources, folder: Path) -> str:
    """The script for sbatch, what each task of it does, and what it does when it comes back."""
    n_tasks = resources.nodes * resources.ranks_per_node
    lines = [
        sbatch_script(slurm_executor(resources, folder), len(jobs)),
        f"# {n_tasks} task{'s' * (n_tasks > 1)}, one a rank:",
    ]
    for word, job in (("", jobs[0]), ("# and after a preemption or the time limit:", jobs[0].resumed())):
        lines += [word] * bool(word)
        ranks = (
            f"RANK=0..{n_tasks - 1} WORLD_SIZE={n_tasks} LOCAL_RANK=0..{resources.ranks_per_node - 1} "
            if n_tasks > 1
            else ""
        )
        lines.append(ranks + shlex.join(["python", os.path.relpath(job.script), *job.arguments]))
    if len(jobs) > 1:
        lines.append(
            f"# this is job 0 of the array of {len(jobs)}; job {len(jobs) - 1}: {shlex.join(jobs[-1].arguments)}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Parse, build, submit."""
    options, command = parse(arguments)
    jobs = tool_jobs(command, options.array)
    resources = resources_of(options, Path(jobs[0].script).stem)
    if options.dry_run:
        print(describe(jobs, resources, options.folder))
    elif options.local:
        for job in jobs:
            run_here(job, resources, options.folder)
        print(f"done; logs are in {options.folder}")
    else:
        numbers = submit(jobs, resources, options.folder)
        print(f"submitted {', '.join(numbers)}; logs will be in {options.folder}")
