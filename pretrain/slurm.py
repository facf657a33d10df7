"""A tool of ours as a SLURM job: one task a GPU, started again after a preemption and at the time limit.

One task a GPU, and no torchrun: srun starts the ranks, gives the scheduler's signals to every one of them and
sees how each of them ends. torchrun knows neither SLURM's notice nor our exit code. submitit writes the job,
and puts it back into the queue.

What happens near the time limit, or when SLURM takes the nodes for someone else: the tasks get a signal; a
tool that listens (:mod:`pretrain.signals`) saves at its next step and leaves with
:data:`pretrain.cli.REQUEUE_CODE`; the first task changes the job's command to one that resumes and puts the
job back into the queue, where it keeps its number, its place and its folder. A tool that does not listen is
put back at once and resumes from its last checkpoint. After a failed node SLURM itself restarts the job.

Tested against stand-ins of sbatch, srun and scontrol, and with submitit's local executor; not on a cluster
(there was none).
"""

import os
import runpy
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit
from pydantic import model_validator
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from pretrain.cli import REQUEUE_CODE
from pretrain.errors import UserError
from pretrain.settings import Settings, setting

# The tools that take --resume; any other starts from its beginning.
RESUMABLE = ("pretrain.py", "train_det.py", "train_seg.py", "evaluate_dense.py")
INDEX = "{index}"  # in a command of an array: the number of the job
PORTS = range(20_000, 32_000)  # below those that Linux hands out by itself


class Resources(Settings):
    """What a job asks SLURM for; but for ``extra`` each is an option of posfield submit."""

    nodes: int = setting(1, "machines", source="ours", ge=1)
    gpus: int = setting(8, "of a node; 0: the CPU", source="ours", ge=0)
    ranks: int = setting(0, "tasks of a node; 0: one a GPU, or one alone without GPUs", source="ours", ge=0)
    cpus: int = setting(8, "cores of a rank", source="ours", ge=1)
    mem_gb: float = setting(0.0, "GB of a node; 0: the cluster's default", source="ours", ge=0)
    hours: float = setting(24.0, "the time limit", source="ours", gt=0)
    partition: str = setting("", "of the cluster", source="ours")
    name: str = setting("", "of the job; empty: that of the tool", source="ours")
    at_once: int = setting(256, "jobs of an array at a time", source="ours", ge=1)
    notice_s: int = setting(180, "seconds between the signal to save and the time limit", source="ours", ge=0)
    max_timeouts: int = setting(
        20, "time limits after which a job is put back; preemptions do not count", source="ours", ge=0
    )
    extra: dict[str, str | bool] = setting(dict, "any option of sbatch", source="ours")

    @model_validator(mode="after")
    def _leaves_time(self) -> "Resources":
        if not 60 * self.hours > self.notice_s / 60:
            raise ValueError(f"hours={self.hours} is not longer than the notice of {self.notice_s} s")
        return self

    @property
    def ranks_per_node(self) -> int:
        """Tasks on a node."""
        return self.ranks or max(self.gpus, 1)


@dataclass(frozen=True)
class ToolJob:
    """What every task of a job does: run a tool, in its own process, as one rank of all.

    script     absolute path of the tool.
    arguments  of its command line.
    """

    script: str
    arguments: tuple[str, ...]

    def resumed(self) -> "ToolJob":
        """The job that resumes from the newest checkpoint, whichever one this job started from."""
        if Path(self.script).name not in RESUMABLE:
            return self
        words = [word for word in self.arguments if not word.startswith("--resume=")]
        while "--resume" in words:
            at = words.index("--resume")
            has_value = (
                bool(words[at + 1 :]) and not words[at + 1].startswith("-") and "=" not in words[at + 1]
            )
            del words[at : at + 1 + has_value]
        return ToolJob(self.script, ("--resume", *words))

    def checkpoint(self) -> DelayedSubmission:
        """submitit asks for this when it puts the job back into the queue."""
        return DelayedSubmission(self.resumed())

    def __call__(self) -> None:
        """Run the tool. Raises RuntimeError when it ends with any code but 0 and REQUEUE_CODE."""
        task = submitit.JobEnvironment()
        os.environ.update(rank_environment(task))
        notice = signal.Signals[f"SIG{task.USR_SIG}"]  # what SLURM sends before the time limit
        requeue = signal.getsignal(
            notice
        )  # submitit's: the first task writes checkpoint() down and puts the job back
        assert callable(requeue), "submitit listens before it starts a job"
        put_back: list[int] = []

        def on_notice(number: int, frame: FrameType | None) -> None:
            tool = signal.getsignal(signal.SIGUSR1)
            if callable(tool):
                tool(signal.SIGUSR1, frame)
            else:
                put_back.append(number)
                requeue(number, frame)  # ends the first task, by SystemExit

        if notice != signal.SIGUSR1:
            signal.signal(notice, on_notice)
        # A job that SLURM itself started again (a node failed, a preemption without grace) had no chance to
        # write it down.
        job = self.resumed() if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else self
        code = run_script(job.script, job.arguments)
        if put_back:
            sys.exit(code)  # submitit's own code: the job is in the queue, however the tool ended
        if code == REQUEUE_CODE:
            if task.global_rank > 0:
                sys.exit(
                    0
                )  # no result, and no failure for which srun would kill the first task before it is done
            requeue(notice, None)
        elif code:
            raise RuntimeError(f"{Path(self.script).name} ended with exit code {code}")


def run_script(script: str, arguments: Sequence[str]) -> int:
    """Run a Python file as ``python script arguments`` would, in this process, so that signals reach it;
    its exit code."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def rank_environment(task: submitit.JobEnvironment) -> dict[str, str]:
    """What torchrun would have set, for :func:`pretrain.distributed.start`; nothing where there is one
    task."""
    if task.num_tasks == 1:
        return {}
    return {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.num_tasks // task.num_nodes),
        "MASTER_ADDR": task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(
            PORTS[int(task.raw_job_id) % len(PORTS)]
        ),  # jobs that share a node have other numbers
    }


def tool_jobs(command: Sequence[str], array: int = 0) -> list[ToolJob]:
    """The jobs of a command line, ``posfield pretrain --config ...``: one, or ``array`` of them, each with
    its number for {index}.

    Raises:
        UserError: no such script; an array whose jobs would all be the same, or {index} without an array; a
            job's folder in which ``import pretrain`` would find a file (tools/ itself).
    """
    if Path("pretrain.py").is_file():
        raise UserError(
            f"{Path.cwd()}: a job that starts here takes pretrain.py for the package; submit it from another folder"
        )
    if not command:
        raise UserError("no command: put it behind --, as in: -- posfield pretrain --config FILE")
    script = Path(command[0])
    if script.suffix != ".py" or not script.is_file():
        raise UserError(f"command: {command[0]} is no Python file")
    has_index = any(INDEX in word for word in command[1:])
    if has_index != bool(array):
        raise UserError(
            f"--array {array}: the command has {'a' if has_index else 'no'} {INDEX}, the number of its job"
        )
    path = str(script.absolute())
    return [
        ToolJob(path, tuple(word.replace(INDEX, str(i)) for word in command[1:])) for i in range(array or 1)
    ]


class Executor(submitit.SlurmExecutor):
    """submitit's, which can also be made where there is no SLURM, to see what it would submit."""

    @classmethod
    def affinity(cls) -> int:
        """Never "not here"."""
        return 2


def slurm_executor(resources: Resources, folder: Path) -> Executor:
    """The executor of a job; ``folder`` gets logs and the job's file (%j: its number)."""
    executor = Executor(folder, max_num_timeout=resources.max_timeouts)
    executor.update_parameters(
        job_name=resources.name,
        nodes=resources.nodes,
        ntasks_per_node=resources.ranks_per_node,
        cpus_per_task=resources.cpus,
        time=max(1, round(60 * resources.hours)),
        gpus_per_node=resources.gpus or None,
        partition=resources.partition or None,
        mem=f"{round(1024 * resources.mem_gb)}M" if resources.mem_gb else None,
        signal_delay_s=resources.notice_s,
        array_parallelism=resources.at_once,
        wckey=None,  # submitit's own would be refused where a cluster checks them
        # A failed node or a preemption without grace: SLURM itself starts the job again.
        additional_parameters={"requeue": True, **resources.extra},
        # Since SLURM 22.05 srun does not know what sbatch was told. A rank that dies takes the others along,
        # which wait for it.
        srun_args=[f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1"],
    )
    return executor


def sbatch_script(executor: Executor, n_jobs: int = 1) -> str:
    """The exact script that :func:`submit` hands to sbatch."""
    if n_jobs == 1:
        return executor._make_submission_file_text(executor._submitit_command_str, "")
    before = dict(executor.parameters)
    try:
        executor.parameters["map_count"] = n_jobs
        return executor._make_submission_file_text(executor._submitit_command_str, "")
    finally:
        executor.parameters = before


def submit(jobs: Sequence[ToolJob], resources: Resources, folder: Path) -> list[str]:
    """Submit to SLURM: a job, or an array of them. Returns their numbers.

    Raises:
        UserError: there is no SLURM here.
    """
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not on the PATH: --dry-run shows what would be submitted, --local runs it here"
            )
    executor = slurm_executor(resources, folder)
    with submitit.helpers.clean_env():  # from within an interactive job: its variables are not the new job's
        submitted = executor.submit_array(list(jobs))
    return [job.job_id for job in submitted]


def run_here(job: ToolJob, resources: Resources, folder: Path) -> None:
    """The same job on this machine, through submitit's local executor; returns when it has ended.

    Raises:
        UserError: it is for more than one node, or it failed; names the log.
    """
    if resources.nodes > 1:
        raise UserError(f"--local: this machine is one node, not {resources.nodes}")
    executor = submitit.LocalExecutor(folder, max_num_timeout=resources.max_timeouts)
    executor.update_parameters(
        timeout_min=60 * resources.hours,
        gpus_per_node=resources.gpus,
        tasks_per_node=resources.ranks_per_node,
        signal_delay_s=resources.notice_s,
    )
    running = executor.submit(job)
    try:
        running.results()
    except KeyboardInterrupt:
        running.cancel()
        raise
    except UncompletedJobError as error:
        logs = running.paths.folder
        raise UserError(f"the job failed ({str(error).splitlines()[0]}); its logs are in {logs}") from error
