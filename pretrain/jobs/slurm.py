"""A command as a SLURM job: one task a GPU, started again after a preemption and at the time limit.

One task a GPU, and no torchrun: srun starts the ranks, gives the scheduler's signals to every one of them and
sees how each of them ends. torchrun knows neither SLURM's notice nor our exit code. submitit writes the job,
and puts it back into the queue.

Near the time limit, or when SLURM takes the nodes for someone else, the tasks get a signal, and pass a SIGUSR1
on to the command. A tool that listens (:mod:`pretrain.signals`) saves at its next step and leaves with
:data:`pretrain.cli.REQUEUE_CODE`; a command that does not listen ends at once. In both cases the first task
changes the job's command to one that resumes and puts the job back into the queue, where it keeps its number,
its place and its folder; a canceled job stays canceled. After a failed node SLURM itself restarts the job.

Tested on a SLURM of two nodes on one machine (tests/test_slurm.py), and with submitit's local executor.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import model_validator

from pretrain.cli import REQUEUE_CODE
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.jobs.stage import Stage
from pretrain.results.renamed import as_posfield
from pretrain.settings import Settings, ours

# submitit is of the extra `cluster`; runs on this machine do without.
if TYPE_CHECKING:
    import submitit
    from submitit.core.utils import DelayedSubmission

RESUMABLE = ("pretrain", "detect", "segment", "evaluate dense")  # these take --resume; others begin anew
INDEX = "{index}"  # in a command of an array: the number of the job
PORTS = range(20_000, 32_000)  # below those that Linux hands out by itself


class Resources(Settings):
    """What a job asks SLURM for; but for ``extra`` each is an option of posfield submit."""

    nodes: int = ours(1, "machines", ge=1)
    gpus: int = ours(8, "of a node; 0: the CPU", ge=0)
    ranks: int = ours(0, "tasks of a node; 0: one a GPU, or one alone without GPUs", ge=0)
    cpus: int = ours(8, "cores of a rank", ge=1)
    mem_gb: float = ours(0.0, "GB of a node; 0: the cluster's default", ge=0)
    hours: float = ours(24.0, "the time limit", gt=0)
    partition: str = ours("", "of the cluster")
    name: str = ours("", "of the job; empty: that of the tool")
    at_once: int = ours(256, "jobs of an array at a time", ge=1)
    notice_s: int = ours(180, "seconds between the signal to save and the time limit", ge=0)
    max_timeouts: int = ours(20, "time limits after which a job is put back; preemptions do not count", ge=0)
    extra: dict[str, str | bool] = ours(dict, "any option of sbatch")

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
    """What every task of a job does: run a command line, as one rank of all."""

    command: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The command as one types it."""
        program, *rest = self.command
        if program != sys.executable or not rest:
            return [program, *rest]
        is_ours = rest[0].endswith("posfield/__main__.py")
        return ["posfield", *rest[1:]] if is_ours else ["python", os.path.relpath(rest[0]), *rest[1:]]

    def resumed(self) -> "ToolJob":
        """The job that resumes from the newest checkpoint, whichever one this job started from."""
        said = as_posfield(self.command)
        n_name = next((n for n in (1, 2) if " ".join(said[1 : 1 + n]) in RESUMABLE), 0)
        if said[0] != "posfield" or not n_name:
            return self
        words = said[1 + n_name :]
        tool = self.command[: len(self.command) - len(words)]
        words = [word for word in words if not word.startswith("--resume=")]
        while "--resume" in words:
            at = words.index("--resume")
            has_value = words[at + 1 : at + 2] and not re.search("^-|=", words[at + 1])
            del words[at : at + (2 if has_value else 1)]
        return ToolJob((*tool, "--resume", *words))

    def checkpoint(self) -> "DelayedSubmission":
        """submitit asks for this when it puts the job back into the queue."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self.resumed())

    def __call__(self) -> None:
        """Run the command. Raises RuntimeError when it fails."""
        import submitit

        task = submitit.JobEnvironment()
        notice = signal.Signals[f"SIG{task.USR_SIG}"]  # what SLURM sends before the time limit
        # submitit's handler: the first task writes checkpoint() down and puts the job back
        requeue = signal.getsignal(notice)
        assert callable(requeue), "submitit listens before it starts a job"
        # A job that SLURM itself started again (a node failed, a preemption without grace) had no chance to
        # write it down.
        job = self.resumed() if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else self
        # SLURM signals all processes of a task; the command inherits that it does not get this one
        signal.pthread_sigmask(signal.SIG_BLOCK, [notice])
        early = list[int]()  # another thread may take a notice before the command runs
        signal.signal(notice, lambda number, _: early.append(number))
        with subprocess.Popen(job.command, env=os.environ | rank_environment(task)) as process:
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            signal.signal(notice, lambda *_: process.send_signal(signal.SIGUSR1))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [notice])
            if early:
                process.send_signal(signal.SIGUSR1)
            try:
                code = process.wait()
            finally:
                process.kill()
        if code in (REQUEUE_CODE, -signal.SIGUSR1):
            if task.global_rank > 0:
                # no result, and no failure for which srun would kill the first task before it is done
                sys.exit(0)
            if is_ended(task.raw_job_id):
                sys.exit(REQUEUE_CODE)
            requeue(notice, None)  # ends the first task
        elif code:
            raise RuntimeError(f"{' '.join(self.words[:2])} ended with exit code {code}")


def is_ended(job_id: str) -> bool:
    """Whether SLURM ends the job of this task for good, or puts it back itself: scancel, scontrol requeue, a
    preemption without grace. scontrol requeue would bring a canceled job back. Not for its time limit, after
    which the job still has KillWait to save in."""
    asked = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T %r"]
    try:
        state, _, reason = subprocess.run(asked, capture_output=True, text=True).stdout.strip().partition(" ")
    except OSError:  # no SLURM here
        return False
    return state not in ("", "RUNNING") and reason != "TimeLimit"


def rank_environment(task: "submitit.JobEnvironment") -> dict[str, str]:
    """What torchrun would have set, for :func:`pretrain.distributed.start`; of one task nothing."""
    if task.num_tasks == 1:
        return {}
    return {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.num_tasks // task.num_nodes),
        "MASTER_ADDR": task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1",
        # jobs that share a node have other numbers
        "MASTER_PORT": str(PORTS[int(task.raw_job_id) % len(PORTS)]),
    }


def tool_jobs(command: Sequence[str], array: int = 0) -> list[ToolJob]:
    """The jobs of a command line: one, or ``array`` of them, each with its number for {index}.

    Raises:
        UserError: an array whose jobs would all be the same, or {index} without an array; a folder in which
            ``import pretrain`` would find a file.
    """
    if Path("pretrain.py").is_file():
        hides = "a job that starts here takes pretrain.py for the package; submit it from another folder"
        raise UserError(f"{Path.cwd()}: {hides}")
    has_index = any(INDEX in word for word in command[1:])
    if has_index != bool(array):
        told = f"the command has {'a' if has_index else 'no'} {INDEX}, the number of its job"
        raise UserError(f"--array {array}: {told}")
    return [ToolJob(tuple(word.replace(INDEX, str(i)) for word in command)) for i in range(array or 1)]


def slurm_executor(resources: Resources, folder: Path) -> "submitit.SlurmExecutor":
    """The executor of a job; ``folder`` gets logs and the job's file (%j: its number)."""
    import submitit

    class Executor(submitit.SlurmExecutor):
        """It can also be made where there is no SLURM, to see what it would submit."""

        affinity = classmethod(lambda cls: 2)

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


def sbatch_script(resources: Resources, folder: Path, n_jobs: int = 1) -> str:
    """The exact script that :func:`submit` hands to sbatch."""
    executor = slurm_executor(resources, folder)
    if n_jobs > 1:
        executor.parameters["map_count"] = n_jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(jobs: Sequence[ToolJob], resources: Resources, folder: Path) -> list[str]:
    """Submit to SLURM: a job, or an array of them. Returns their numbers.

    Raises:
        UserError: there is no SLURM here, or it refuses the job.
    """
    if absent := [program for program in ("sbatch", "srun") if shutil.which(program) is None]:
        instead = "--dry-run shows what would be submitted, --local runs it here"
        raise UserError(f"{absent[0]} is not on the PATH: {instead}")
    import submitit
    from submitit.core.utils import FailedJobError

    executor = slurm_executor(resources, folder)
    # Where SLURM is, and outside of a job what its user says by SBATCH_ACCOUNT and the like.
    names = ("SLURM_CONF",) if "SLURM_JOB_ID" in os.environ else ("SLURM_", "SBATCH_")
    kept = {name: value for name, value in os.environ.items() if name.startswith(names)}
    with submitit.helpers.clean_env():  # from within an interactive job: its variables are not the new job's
        os.environ.update(kept)
        try:
            return [job.job_id for job in executor.submit_array(list(jobs))]
        except FailedJobError as error:
            raise UserError(f"sbatch: {error}") from error


@dataclass(frozen=True)
class Queue:
    """Where a runner hands stages to SLURM: what each job asks for, and the folder of the logs."""

    resources: Resources
    folder: Path

    def jobs(self, stage: Stage) -> tuple[list[ToolJob], Resources]:
        """A stage's job under its name, or its array, whose jobs have a GPU each."""
        asked = self.resources
        n_gpus = min(asked.gpus, 1) if stage.array else asked.gpus
        own = {"name": asked.name or stage.name.replace("/", "."), "gpus": n_gpus}
        return tool_jobs(stage.command, stage.array), asked.model_copy(update=own)

    def submit(self, stage: Stage) -> str:
        """Submit a stage and note its number beside its folder, so that it is not submitted twice."""
        numbers = submit(*self.jobs(stage), self.folder)
        write_text(stage.note("job"), numbers[0].partition("_")[0])
        return ", ".join(numbers)


def run_here(job: ToolJob, resources: Resources, folder: Path) -> None:
    """The same job on this machine, through submitit's local executor; returns when it has ended.

    Raises:
        UserError: it is for more than one node, or it failed; names the log.
    """
    if resources.nodes > 1:
        raise UserError(f"--local: this machine is one node, not {resources.nodes}")
    import submitit
    from submitit.core.utils import UncompletedJobError

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
